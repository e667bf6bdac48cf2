"""From command line, environment and file to Settings; and all texts that are made from the table of options."""
