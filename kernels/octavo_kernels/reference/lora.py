"""Low-rank adapters, a different one for each token."""

from __future__ import annotations

import torch


def add_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """out[t] += scales[a] * lora_b[a] @ (lora_a[a] @ x[t]) with a = adapters[t], in place; returns out.

    out: [T, out_features] (may be a slice of a fused projection), x: [T, in_features], lora_a: [L, rank,
    in_features], lora_b: [L, out_features, rank], adapters: [T] int32 (-1: none), scales: [L] float32.
    LoRA: arXiv 2106.09685; mixed batches: Punica, arXiv 2310.18547.
    """
    for adapter in range(lora_a.shape[0]):
        rows = (adapters == adapter).nonzero().squeeze(1)
        low = x[rows].float() @ lora_a[adapter].float().t()
        added = scales[adapter] * (low @ lora_b[adapter].float().t())
        out[rows] = (out[rows].float() + added).to(out.dtype)
    return out
