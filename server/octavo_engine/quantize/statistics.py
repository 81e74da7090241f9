"""What calibration text says about the inputs of a projection."""

from __future__ import annotations

import torch


class InputStatistics:
    """Sums over all calibration tokens. gram: X^T X [in, in]; absolute: sum of |x| [in]; largest: max of |x| [in]."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.count = 0
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.absolute = torch.zeros(in_features, device=device)
        self.largest = torch.zeros(in_features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Take the inputs of one call. x: [T, in]."""
        x = x.float()
        self.count += x.shape[0]
        self.gram.addmm_(x.t(), x)
        magnitude = x.abs()
        self.absolute += magnitude.sum(0)
        self.largest = torch.maximum(self.largest, magnitude.amax(0))

    @property
    def mean_square(self) -> torch.Tensor:
        """[in]"""
        return self.gram.diagonal() / max(self.count, 1)

    def rescale(self, scale: torch.Tensor) -> None:
        """The statistics of x / scale. scale: [in]."""
        self.gram /= scale.unsqueeze(0) * scale.unsqueeze(1)
        self.absolute /= scale
        self.largest /= scale
