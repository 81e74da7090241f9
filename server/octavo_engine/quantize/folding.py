"""Move scales between neighbours without changing what the model computes.

An input channel of a projection can be multiplied by s if whatever produces that channel divides by s: the norm
before query, key, value or before gate and up; the value rows before the output projection; the up rows before down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from octavo_engine.quantize.observed import Projection
from octavo_engine.quantize.statistics import InputStatistics

NORMS_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Fold:
    """A projection and what comes before it: a norm's weight, or rows of another projection.

    norm_offset: what the stored weight of the norm lacks. heads: (query heads, key-value heads) where several query
    heads read one value channel, which must agree on s.
    """

    projection: Projection
    norm: torch.Tensor | None = None
    norm_offset: float = 0.0
    producer: Projection | None = None
    rows: slice | None = None
    heads: tuple[int, int] | None = None

    def shared(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale [in] made equal where channels come from one row."""
        if self.heads is None:
            return scale
        queries, values = self.heads
        by_head = scale.view(values, queries // values, -1)
        return by_head.mean(1, keepdim=True).expand_as(by_head).reshape(-1)

    def apply(self, scale: torch.Tensor, statistics: InputStatistics) -> None:
        """Multiply the projection's inputs by `scale` [in], and divide where they come from.

        A norm keeps only 8 bits of mantissa in its file; the scale gives way a little, so that both fit exactly.
        """
        if self.norm is not None:
            divided = (self.norm / scale - self.norm_offset).bfloat16().float() + self.norm_offset
            scale = torch.where(divided == 0, scale, self.norm / divided)
        self.projection.weight *= scale
        statistics.rescale(scale)
        if self.norm is not None:
            self.norm.div_(scale)
        if self.producer is not None and self.rows is not None:
            per_row = scale
            if self.heads is not None:
                queries, values = self.heads
                per_row = scale.view(values, queries // values, -1)[:, 0].reshape(-1)
            self.producer.weight[self.rows] /= per_row.unsqueeze(1)
            if self.producer.bias is not None:
                self.producer.bias[self.rows] /= per_row


def find_folds(
    prefix: str,
    projections: Sequence[Projection],
    norms: Mapping[str, tuple[torch.Tensor, float]],
    heads: tuple[int, int],
) -> list[Fold]:
    """The folds of one layer in the order of computation. Norms that also feed a router are left alone."""
    folds: list[Fold] = []
    attention = _with_part(projections, "q_proj", "qkv_proj")
    output = _with_part(projections, "o_proj")
    gate_up = _with_part(projections, "gate_proj", "gate_up_proj")
    down = _with_part(projections, "down_proj")
    before_attention = norms.get(f"{prefix}.input_layernorm.weight")
    if attention is not None and before_attention is not None:
        folds.append(Fold(attention, norm=before_attention[0], norm_offset=before_attention[1]))
    if attention is not None and output is not None and (value := attention.part("v_proj")) is not None:
        folds.append(Fold(output, producer=attention, rows=attention.rows_of(value), heads=heads))
    names = [f"{prefix}.{name}.weight" for name in NORMS_BEFORE_MLP]
    before_mlp = next((norms[name] for name in names if name in norms), None)
    if gate_up is not None and before_mlp is not None:
        folds.append(Fold(gate_up, norm=before_mlp[0], norm_offset=before_mlp[1]))
    if gate_up is not None and down is not None and (up := gate_up.part("up_proj")) is not None:
        folds.append(Fold(down, producer=gate_up, rows=gate_up.rows_of(up)))
    return folds


def _with_part(projections: Sequence[Projection], *suffixes: str) -> Projection | None:
    """The only projection of that kind in the layer; None where there are several (experts) or none."""
    found = [item for item in projections if any(item.part(suffix) is not None for suffix in suffixes)]
    return found[0] if len(found) == 1 else None
