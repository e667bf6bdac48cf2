"""tproxy-relay: a transparent TCP relay for Linux."""

__version__ = "0.1.0.dev0"
