"""Self-attention over the paged KV cache, or inside packed sequences where there is no cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.layers.linear import Linear
from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with the switches the model families need.

    qkv: query, key and value as one projection. cos_sin: [max_positions, rotary_dim], None turns nothing.
    q_norm, k_norm: [head_dim] RMSNorm of each head before the rotation. sinks: [num_heads], see
    `ops.paged_attention`.
    """

    qkv: Callable[[torch.Tensor], torch.Tensor]
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    cos_sin: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    norm_eps: float = 1e-6
    sliding_window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    causal: bool = True

    def __call__(self, x: torch.Tensor, batch: AttentionBatch, cache: PagedKVCache | None) -> torch.Tensor:
        """x: [T, hidden_size] -> [T, hidden_size]. Without a cache, sequences are whole and see only themselves."""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        query, key = ops.rope_and_store_kv(
            query,
            key,
            value,
            batch.positions,
            batch.slot_mapping,
            cache,
            self.cos_sin,
            self.q_norm,
            self.k_norm,
            self.norm_eps,
        )
        mask = (self.sliding_window, self.soft_cap, self.sinks)
        if cache is not None:
            out = ops.paged_attention(query, cache, batch, self.scale, *mask)
        else:
            out = ops.varlen_attention(query, key, value, batch.query_start_loc, self.scale, self.causal, *mask)
        return self.output(out.reshape(x.shape[0], -1))
