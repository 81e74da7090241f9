"""What an adapter is, and where in a model it may reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A projection that adapters may change: y += scale * B @ (A @ x) with A [rank, in_features] and B
    [out_features, rank] (LoRA, arXiv 2106.09685)."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """One projection's change. down: A, [rank, in_features]; up: B, [out_features, rank]; both on the CPU."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter in host memory, by the names of the projections it changes.

    digest: of its files, so that cached prefixes of an earlier adapter under the same name are not taken for its own.
    """

    name: str
    path: str
    digest: str
    rank: int
    changes: Mapping[str, LowRank] = field(default_factory=dict)
