"""From token states to one vector for each text."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token states [T, dim], bounds [S + 1] -> [S, n] float32


class PoolingMethod(enum.StrEnum):
    """Which token states make the vector."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a model's texts become vectors; `normalize` scales them to length one."""

    method: PoolingMethod
    normalize: bool

    def __call__(self, hidden: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """hidden: [T, hidden_size]; query_start_loc: [S + 1] int32 -> [S, hidden_size] float32."""
        bounds = query_start_loc.long()
        if self.method is PoolingMethod.MEAN:
            lengths = bounds.diff()
            sums = torch.zeros((len(lengths), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
            pooled = sums.index_add_(0, owner, hidden.float()) / lengths.unsqueeze(1)
        else:
            rows = bounds[:-1] if self.method is PoolingMethod.CLS else bounds[1:] - 1
            pooled = hidden[rows].float()
        return functional.normalize(pooled, dim=-1) if self.normalize else pooled
