"""The command line: options become a configuration, one library call, then text.

Signatures need words and paths alone, so that help is there at once; what computes is imported inside the commands.
"""
