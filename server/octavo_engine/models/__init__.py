"""Model architectures: one file for each family, saying only what is particular to it."""
