"""What the processes of one relay share: messages, and memory."""
