"""Log-probabilities of the model's own distribution, before any processor or filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.messages import TokenLogprobs
from octavo_engine.staging import OnTheWay


class LogprobsOnTheWay:
    """What is reported of given tokens and their best alternatives, while the device computes it.

    logits: [R, V] float32, unprocessed. token_ids: [R] int64 on the device; a negative one, the mark of a row without
    a choice, is not reported. num_top: alternatives of each row.
    """

    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]) -> None:
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1))
        ranks = (logprobs > chosen).sum(dim=-1).add_(1)  # rank 1 is the most likely token
        width = min(max(num_top, default=0), logits.shape[1])
        top_values, top_ids = torch.topk(logprobs, width, dim=-1)
        self._num_top = num_top
        self._numbers = OnTheWay(token_ids, chosen.squeeze(1), ranks, top_ids, top_values)

    def wait(self) -> list[TokenLogprobs | None]:
        """One entry a row."""
        columns = (tensor.tolist() for tensor in self._numbers.wait())
        return [
            TokenLogprobs(
                token_id=token, logprob=value, rank=rank, top=list(zip(best[:count], values[:count], strict=True))
            )
            if token >= 0
            else None
            for token, value, rank, best, values, count in zip(*columns, self._num_top, strict=True)
        ]
