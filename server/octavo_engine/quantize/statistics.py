"""What calibration text says about the inputs of a projection."""

from __future__ import annotations

import torch

SAMPLE_TOKENS = 512
SAMPLE_TOKENS_EACH = 64


class InputStatistics:
    """Sums over all calibration tokens. gram: X^T X [in, in]; absolute: sum of |x| [in].

    sample: [at most SAMPLE_TOKENS, in], inputs as they came, spread over the calls.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.count = 0
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.absolute = torch.zeros(in_features, device=device)
        self.sample = torch.empty(0, in_features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Take the inputs of one call. x: [T, in]."""
        x = x.float()
        self.count += x.shape[0]
        self.gram.addmm_(x.t(), x)
        self.absolute += x.abs().sum(0)
        room = SAMPLE_TOKENS - self.sample.shape[0]
        self.sample = torch.cat((self.sample, x[:: max(x.shape[0] // SAMPLE_TOKENS_EACH, 1)][:room]))

    @property
    def mean_square(self) -> torch.Tensor:
        """[in]"""
        return self.gram.diagonal() / max(self.count, 1)

    def rescale(self, scale: torch.Tensor) -> None:
        """The statistics of x / scale. scale: [in]."""
        self.gram /= scale.unsqueeze(0) * scale.unsqueeze(1)
        self.absolute /= scale
        self.sample /= scale
