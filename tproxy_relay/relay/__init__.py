"""One connection, from the accepted socket to its record."""
