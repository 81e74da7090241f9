"""How surprised a model is by a text: exp of the mean negative log-likelihood a token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from octavo_engine.models.decoder import Decoder
from octavo_engine.runner.batch_builder import build_packed

LOGIT_ROWS = 256


@torch.inference_mode()
def perplexity(model: Decoder, windows: Sequence[Sequence[int]], device: torch.device) -> float:
    """Over windows of token ids, each read from its start; the first token of a window is not predicted."""
    total, count = 0.0, 0
    for window in windows:
        token_ids, batch = build_packed([window], device)
        hidden = model.forward(token_ids, batch, [None] * model.cache_layout.num_layers)
        for start in range(0, len(window) - 1, LOGIT_ROWS):
            end = min(start + LOGIT_ROWS, len(window) - 1)
            logits = model.logits(hidden[start:end])
            total += float(functional.cross_entropy(logits, token_ids[start + 1 : end + 1], reduction="sum"))
            count += end - start
    return math.exp(total / max(count, 1))
