"""The command line: parses arguments and wires the parts; nothing else constructs the big objects."""
