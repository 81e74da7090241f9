"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo_kernels import ops


@dataclass(frozen=True, slots=True)
class Routing:
    """See `ops.route_experts` for the fields of the same name.

    by_best: groups are ranked by their best expert's probability instead (DeepSeek-V2).
    """

    top_k: int
    renormalize: bool
    sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1
    by_best: bool = False
    scale: float = 1.0
    correction_bias: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, num_experts] -> (weights [T, top_k] float32, experts [T, top_k] int32)."""
        if self.by_best and self.num_groups > 1:
            return self._by_best(logits)
        return ops.route_experts(
            logits,
            self.top_k,
            self.sigmoid,
            self.renormalize,
            self.correction_bias,
            self.num_groups,
            self.top_groups,
            self.scale,
        )

    def _by_best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.float().softmax(-1)
        grouped = scores.view(len(scores), self.num_groups, -1)
        best = grouped.amax(-1).topk(self.top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        weights, experts = grouped.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(1).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, experts.int()
