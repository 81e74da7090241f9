"""Numerical kernels: a torch reference for every op, and faster backends beside it."""
