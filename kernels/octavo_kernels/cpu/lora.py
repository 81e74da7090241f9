"""Adapters of mixed batches as two small products for each adapter that the batch really has."""

from __future__ import annotations

import torch

from octavo_kernels import ops


@ops.add_lora.register("cpu")
def add_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Products in float32, through torch: at these sizes the calls cost more than the arithmetic, so no row is picked
    out where all have the same adapter."""
    slots = adapters.tolist()
    for slot in set(slots):
        if slot < 0:
            continue
        rows = None if slots.count(slot) == len(slots) else (adapters == slot).nonzero().squeeze(1)
        own = x if rows is None else x.index_select(0, rows)
        added = (own.float() @ lora_a[slot].float().t()) @ lora_b[slot].float().t()
        added *= scales[slot]
        if rows is None:
            out += added
        else:
            out.index_copy_(0, rows, (out.index_select(0, rows) + added).to(out.dtype))
    return out
