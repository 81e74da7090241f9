"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over its compressed paged cache."""

from __future__ import annotations

import torch

from octavo_kernels.batch import AttentionBatch


def mla_attention(
    query: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, scale: float, latent_dim: int
) -> torch.Tensor:
    """Causal attention of the step's tokens in the latent space: every head reads the same keys.

    query: [T, num_heads, latent_dim + rope_dim], the latent part already multiplied with the key up-projection.
    cache: [num_blocks, block_size, latent_dim + rope_dim]; values are the latent part of the keys.
    Returns [T, num_heads, latent_dim], to be multiplied with the value up-projection.
    """
    out = torch.empty((*query.shape[:2], latent_dim), dtype=query.dtype, device=query.device)
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    for seq, length in enumerate(lengths):
        tokens = slice(starts[seq], starts[seq + 1])
        blocks = batch.block_tables[seq, : -(-length // cache.shape[1])].long()
        keys = cache[blocks].flatten(0, 1)[:length].float()
        scores = torch.einsum("thd,nd->htn", query[tokens].float(), keys) * scale
        hidden = torch.arange(length, device=query.device) > batch.positions[tokens].unsqueeze(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("htn,nd->thd", weights, keys[:, :latent_dim]).to(query.dtype)
    return out
