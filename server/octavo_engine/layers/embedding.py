"""Token embeddings and the output head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo_kernels import ops
from octavo_kernels.weights import Weight


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows by token id, times `scale` (Gemma: sqrt of the width, rounded to the activations' type)."""

    weight: Weight
    dtype: torch.dtype
    scale: float = 1.0

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = ops.embedding(token_ids, self.weight, self.dtype)
        return rows if self.scale == 1.0 else rows * self.scale


@dataclass(frozen=True, slots=True)
class LMHead:
    """Hidden states to logits in float32. soft_cap: cap * tanh(logits / cap), 0 for none."""

    weight: Weight
    soft_cap: float = 0.0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = ops.linear(hidden, self.weight).float()
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits
