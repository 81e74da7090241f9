"""Token embeddings and the output head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_kernels import ops
from octavo_kernels.weights import Weight


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows by token id, times `scale` (Gemma: sqrt of the width, rounded to the activations' type).

    first_row: of the vocabulary that `weight` holds; `reduce` then adds the rows other ranks hold.
    """

    weight: Weight
    dtype: torch.dtype
    scale: float = 1.0
    first_row: int = 0
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.reduce is None:
            rows = ops.embedding(token_ids, self.weight, self.dtype)
        else:
            local, count = token_ids - self.first_row, self.weight.shape[0]
            held = (local >= 0) & (local < count)
            rows = ops.embedding(local.clamp(0, count - 1), self.weight, self.dtype)
            rows = self.reduce(rows * held.unsqueeze(1))
        return rows if self.scale == 1.0 else rows * self.scale


@dataclass(frozen=True, slots=True)
class LMHead:
    """Hidden states to logits in float32. soft_cap: cap * tanh(logits / cap), 0 for none.

    gather: puts the columns of all ranks side by side, where each holds some.
    """

    weight: Weight
    soft_cap: float = 0.0
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = ops.linear(hidden, self.weight).float()
        logits = logits if self.gather is None else self.gather(logits)
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits
