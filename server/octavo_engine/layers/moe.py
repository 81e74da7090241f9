"""Mixture of experts: a router sends each token to a few of many MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP


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

    router: [T, hidden_size] -> [T, num_experts]. renormalize: the chosen probabilities are scaled to sum to one,
    which equals a softmax over the chosen logits alone. experts: those of this rank, from `first_expert` on; reduce:
    sums what the ranks' experts make.
    """

    router: Linear
    experts: tuple[GatedMLP, ...]
    top_k: int
    renormalize: bool
    shared: SharedExpert | None = None
    first_expert: int = 0
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        probabilities, chosen = route(self.router(x), self.top_k, self.renormalize)
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for index in torch.unique(chosen).tolist():
            if not 0 <= index - self.first_expert < len(self.experts):
                continue
            tokens, slot = (chosen == index).nonzero(as_tuple=True)
            share = probabilities[tokens, slot].unsqueeze(1).to(x.dtype)
            out.index_add_(0, tokens, self.experts[index - self.first_expert](x[tokens]) * share)
        return out if self.reduce is None else self.reduce(out)


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, num_experts] -> (probabilities [T, top_k] float32, experts [T, top_k] int64), best first."""
    probabilities, chosen = logits.float().softmax(-1).topk(top_k, dim=-1)
    if renormalize:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, chosen
