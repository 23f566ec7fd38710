"""The command line: flags, parser, suggestions, completion, exit statuses. Imports no torch."""
