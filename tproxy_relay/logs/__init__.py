"""Log lines: made, written, carried from the workers to the log."""
