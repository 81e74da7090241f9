"""Mixture of experts: a router sends each token to a few of many MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.layers.routing import Routing


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert every token passes through, weighed by a gate of its own (Qwen2-MoE)."""

    mlp: GatedMLP
    gate: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.gate(x)) * self.mlp(x)


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed experts; each expert multiplies all its tokens at once.

    router: [T, hidden_size] -> [T, num_experts]. experts: those of this rank, from `first_expert` on; reduce: sums what
    the ranks' experts make. shared: an expert every token passes through.
    """

    router: Linear
    experts: tuple[GatedMLP, ...]
    routing: Routing
    shared: SharedExpert | GatedMLP | None = None
    first_expert: int = 0
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        probabilities, chosen = self.routing(self.router(x))
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for index in torch.unique(chosen).tolist():
            if not 0 <= index - self.first_expert < len(self.experts):
                continue
            tokens, slot = (chosen == index).nonzero(as_tuple=True)
            share = probabilities[tokens, slot].unsqueeze(1).to(x.dtype)
            out.index_add_(0, tokens, self.experts[index - self.first_expert](x[tokens]) * share)
        return out if self.reduce is None else self.reduce(out)
