"""The whole of Hernandez et al. 2022 as one resumable computation."""
