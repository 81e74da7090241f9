"""Running a model over scheduled slices of sequences."""
