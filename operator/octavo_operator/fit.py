"""Whether a model fits the memory of its accelerators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """The verdict and the numbers behind it, in words."""

    fits: bool
    message: str
