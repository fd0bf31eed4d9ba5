"""Measures the sweep on this machine: against its ceilings, in its parts, and beside other ways to train the cells."""
