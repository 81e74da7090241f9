"""The greatest entry of each row."""

from __future__ import annotations

import torch

BLOCK = 64


def row_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and first indices [R] of the greatest entries of `logits` [R, V]; a NaN counts as the greatest.

    PyTorch's CPU kernel that returns indices is not vectorised, the one that returns values is: reducing blocks
    first and looking for the index in the best block alone takes a tenth of the time.
    """
    if logits.device.type != "cpu" or logits.shape[1] % BLOCK:
        values, indices = logits.max(dim=-1)
        return values, indices
    blocks = logits.contiguous().view(len(logits), -1, BLOCK)
    best = blocks.amax(dim=-1).argmax(dim=-1)
    values, offsets = blocks[torch.arange(len(logits)), best].max(dim=-1)
    return values, best * BLOCK + offsets
