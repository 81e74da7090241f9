"""From token states to one score for each label of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.runner.pooling import Pooling

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Classifier:
    """Pools, then applies the head's steps. activation: from the head's numbers to scores."""

    pooling: Pooling
    steps: tuple[Step, ...]
    activation: Step

    def __call__(self, hidden: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """hidden: [T, hidden_size]; query_start_loc: [S + 1] int32 -> [S, labels] float32."""
        x = self.pooling(hidden, query_start_loc).to(hidden.dtype)
        for step in self.steps:
            x = step(x)
        scores: torch.Tensor = self.activation(x.float())
        return scores


@dataclass(frozen=True, slots=True)
class YesOrNo:
    """The probability that a language model says yes rather than no as the next token: [S, vocab] -> [S, 1]."""

    yes: int
    no: int

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, [self.no, self.yes]].softmax(-1)[:, 1:]
