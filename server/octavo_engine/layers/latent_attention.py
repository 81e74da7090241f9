"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed vector a token is all that is cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.norm import RMSNorm
from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """query: [T, hidden] -> [T, heads * (plain + rope)]; compress: [T, hidden] -> [T, latent + rope].

    key_up: [heads, plain, latent] and value_up: [heads, value, latent] are multiplied with queries and with what
    attention returns, so that all heads read the same cached vectors. pairs: rotated dimensions are neighbours in the
    checkpoint, not two halves. cos_sin: [max_positions, rope].
    """

    query: Callable[[torch.Tensor], torch.Tensor]
    compress: Linear
    latent_norm: RMSNorm
    key_up: torch.Tensor
    value_up: torch.Tensor
    output: Linear
    rope_dim: int
    scale: float
    cos_sin: torch.Tensor | None
    pairs: bool

    def __call__(self, x: torch.Tensor, batch: AttentionBatch, cache: PagedKVCache | None) -> torch.Tensor:
        """x: [T, hidden_size] -> [T, hidden_size]."""
        heads, plain_dim, latent_dim = self.key_up.shape
        queries = self.query(x).view(x.shape[0], heads, plain_dim + self.rope_dim)
        plain, query_rope = torch.split(queries, [plain_dim, self.rope_dim], dim=-1)
        latent, key_rope = torch.split(self.compress(x), [latent_dim, self.rope_dim], dim=-1)
        latent = self.latent_norm(latent.contiguous())
        query_rope, key_rope = self._rotated(query_rope, key_rope.unsqueeze(1), batch)
        absorbed = torch.einsum("thn,hnl->thl", plain, self.key_up)
        query = torch.cat((absorbed, query_rope), dim=-1)
        key = torch.cat((latent, key_rope.squeeze(1)), dim=-1)
        if cache is None:
            value = functional.pad(latent, (0, self.rope_dim)).unsqueeze(1)
            bounds = batch.query_start_loc
            out = ops.varlen_attention(query, key.unsqueeze(1), value, bounds, self.scale, True)[..., :latent_dim]
        else:
            _store(key, batch.slot_mapping, cache)
            out = ops.mla_attention(query, cache.key.squeeze(1), batch, self.scale, latent_dim)
        return self.output(torch.einsum("thl,hvl->thv", out, self.value_up).flatten(1))

    def _rotated(
        self, query: torch.Tensor, key: torch.Tensor, batch: AttentionBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pairs:
            query, key = (torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) for x in (query, key))
        query, key = query.contiguous(), key.contiguous()
        return ops.rope_and_store_kv(query, key, key, batch.positions, batch.slot_mapping, None, self.cos_sin)


def _store(key: torch.Tensor, slots: torch.Tensor, cache: PagedKVCache) -> None:
    """Write each token's vector at its slot. key: [T, latent + rope].

    Padding (slots below 0, behind the real tokens) writes the first token's vector once more to its own place: no
    step that a graph records may depend on how much padding there is.
    """
    real = slots >= 0
    place = torch.where(real, slots, slots[:1])
    rows = torch.where(real.unsqueeze(1), key, key[:1]).to(cache.key.dtype)
    cache.key.view(-1, key.shape[-1])[place] = rows
