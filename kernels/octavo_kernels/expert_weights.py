"""The matrices of a mixture's experts, stacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo_kernels.weights import QuantizedWeight


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """data: [experts, out, in], floating, int8 or float8_e4m3fn, or a quantized weight [experts * out, in] of `count`
    experts below each other; scale: [experts, out] float32 for plain 8-bit data (weight = data * scale); bias:
    [experts, out] or None."""

    data: torch.Tensor | QuantizedWeight
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    count: int = 0

    @property
    def num_experts(self) -> int:
        return self.data.shape[0] if isinstance(self.data, torch.Tensor) else self.count

    @property
    def out_features(self) -> int:
        return self.data.shape[1] if isinstance(self.data, torch.Tensor) else self.data.shape[0] // self.count

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The dense matrix [out, in] of one expert."""
        if isinstance(self.data, QuantizedWeight):
            first = expert * self.out_features
            return self.data.dequantize(dtype)[first : first + self.out_features]
        dense = self.data[expert].float()
        return (dense if self.scale is None else dense * self.scale[expert].unsqueeze(1)).to(dtype)


def join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the rows of all, or None where they are of different forms.

    Every form keeps tensors that count the output rows in its `ROW_DIMENSION`, and numbers that describe the format; a
    form with a scale for the whole tensor cannot be joined.
    """
    first = weights[0]
    if not dataclasses.is_dataclass(first) or any(type(weight) is not type(first) for weight in weights):
        return None
    joined: dict[str, Any] = {}
    rows = first.ROW_DIMENSION
    for field in dataclasses.fields(first):
        values = [getattr(weight, field.name) for weight in weights]
        if not isinstance(values[0], torch.Tensor):
            if any(value != values[0] for value in values):
                return None
        elif any(
            value.dim() <= rows or value.shape[rows] != weight.shape[0]
            for value, weight in zip(values, weights, strict=True)
        ):
            return None
        else:  # bytes, because torch joins no float8 on some devices
            joined[field.name] = torch.cat([value.view(torch.uint8) for value in values], rows).view(values[0].dtype)
    return dataclasses.replace(first, **joined)
