"""The study of Hernandez et al. 2022 as one computation that can be interrupted and resumed."""
