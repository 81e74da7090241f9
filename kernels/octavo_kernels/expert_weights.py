"""The matrices of a mixture's experts, stacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """data: [experts, out, in], floating, int8 or float8_e4m3fn; scale: [experts, out] float32 for the 8-bit forms
    (weight = data * scale); bias: [experts, out] or None."""

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.data.shape[0]

    @property
    def out_features(self) -> int:
        return self.data.shape[1]

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The dense matrix [out, in] of one expert."""
        dense = self.data[expert].float()
        return (dense if self.scale is None else dense * self.scale[expert].unsqueeze(1)).to(dtype)
