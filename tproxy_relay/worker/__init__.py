"""The process that accepts connections."""
