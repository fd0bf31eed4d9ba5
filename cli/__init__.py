"""The command line: flags become a configuration, one library call, then text."""
