"""The kernel's networking: sockets and their options, addresses, listeners. Nowhere else is there a setsockopt."""
