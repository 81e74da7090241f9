"""Log-probabilities of the model's own distribution, before any processor or filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.messages import TokenLogprobs


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Report the given token of each row and its `num_top` best alternatives.

    `logits` [R, V] float32, unprocessed. Rank 1 is the most likely token.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, ids)
    ranks = (logprobs > chosen).sum(dim=-1).add_(1).tolist()
    width = min(max(num_top, default=0), logits.shape[1])
    top_values, top_ids = torch.topk(logprobs, width, dim=-1)
    rows = zip(
        token_ids, chosen.squeeze(1).tolist(), ranks, top_ids.tolist(), top_values.tolist(), num_top, strict=True
    )
    return [
        TokenLogprobs(
            token_id=token, logprob=value, rank=rank, top=list(zip(best[:count], values[:count], strict=True))
        )
        for token, value, rank, best, values, count in rows
    ]
