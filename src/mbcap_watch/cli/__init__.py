"""The command line: commands, options, signals, and all that a person sees."""
