"""How surprised a model is by a text, and how sure it is that another is more so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from octavo_engine.models.decoder import Decoder
from octavo_engine.runner.batch_builder import build_packed

LOGIT_ROWS = 256
PIECE_TOKENS = 32  # neighbours go together: only the means of such pieces count as independent


@torch.inference_mode()
def token_losses(model: Decoder, windows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Negative log-likelihood of each token [T], in nats, over windows of token ids, each read from its start; the
    first token of a window is not predicted."""
    losses = []
    for window in windows:
        token_ids, batch = build_packed([window], device)
        hidden = model.forward(token_ids, batch, [None] * model.cache_layout.num_layers)
        for start in range(0, len(window) - 1, LOGIT_ROWS):
            end = min(start + LOGIT_ROWS, len(window) - 1)
            logits = model.logits(hidden[start:end])
            losses.append(functional.cross_entropy(logits, token_ids[start + 1 : end + 1], reduction="none"))
    return torch.cat(losses)


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean loss a token. losses: [T]."""
    return math.exp(float(losses.mean(dtype=torch.float64)))


def change_error(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Two standard errors of the relative change in perplexity between the losses [T] of the same tokens.

    None for a text of fewer than two pieces.
    """
    pieces = len(before) // PIECE_TOKENS
    if pieces < 2:
        return None
    means = (after - before)[: pieces * PIECE_TOKENS].double().view(pieces, PIECE_TOKENS).mean(1)
    return 2 * float(means.std()) / math.sqrt(pieces) * perplexity(after) / perplexity(before)
