"""The cases of ``bench/faults.py``."""
