"""A packed batch whose texts may be pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from octavo_kernels.batch import AttentionBatch


@dataclass(slots=True)
class PairBatch(AttentionBatch):
    """token_types: [T] int64, 0 or 1: which of two texts a token is of, for encoders that tell them apart."""

    token_types: torch.Tensor | None = None


def with_token_types(batch: AttentionBatch, token_types: torch.Tensor) -> PairBatch:
    """The same batch, knowing its pairs."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return PairBatch(**fields, token_types=token_types)
