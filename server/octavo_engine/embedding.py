"""Texts waiting to be pooled into vectors, batched by tokens."""

from __future__ import annotations

from collections import OrderedDict

import torch

from octavo_engine.errors import EngineDeadError
from octavo_engine.messages import EmbedRequest, FinishReason, SequenceOutput
from octavo_engine.runner.interface import ModelRunner


class EmbeddingQueue:
    """First come, first served, `max_tokens` a step, so that sequences that generate wait for one step at most."""

    def __init__(self, runner: ModelRunner, max_tokens: int) -> None:
        self._runner = runner
        self._max_tokens = max_tokens
        self._waiting: OrderedDict[str, EmbedRequest] = OrderedDict()
        self.num_tokens = 0
        self.num_tokens_done = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, request: EmbedRequest) -> None:
        self._waiting[request.request_id] = request
        self.num_tokens += len(request.prompt_token_ids)

    def remove(self, request_id: str) -> None:
        """Forget a request that has not run yet; unknown ids are ignored."""
        request = self._waiting.pop(request_id, None)
        if request is not None:
            self.num_tokens -= len(request.prompt_token_ids)

    def step(self) -> list[SequenceOutput]:
        """Pool as many waiting texts as fit one step, at least one."""
        batch = self._next_batch()
        return self._pool(batch) if batch else []

    def _next_batch(self) -> list[EmbedRequest]:
        batch: list[EmbedRequest] = []
        room = self._max_tokens
        while self._waiting:
            request = next(iter(self._waiting.values()))
            if batch and len(request.prompt_token_ids) > room:
                break
            room -= len(request.prompt_token_ids)
            self.remove(request.request_id)
            batch.append(request)
        return batch

    def _pool(self, batch: list[EmbedRequest]) -> list[SequenceOutput]:
        """Pool a batch; a text that cannot be computed fails alone."""
        try:
            vectors = self._runner.embed(
                [request.prompt_token_ids for request in batch], [request.second_start for request in batch]
            )
        except (torch.AcceleratorError, EngineDeadError):
            raise
        except Exception as error:
            if len(batch) == 1:
                return [_failed(batch[0], f"the model could not embed this text: {type(error).__name__}: {error}")]
            middle = len(batch) // 2
            return self._pool(batch[:middle]) + self._pool(batch[middle:])
        finite = torch.isfinite(vectors).all(dim=-1).tolist()
        self.num_tokens_done += sum(len(request.prompt_token_ids) for request in batch)
        return [
            SequenceOutput(request_id=request.request_id, token_ids=[], finish_reason=FinishReason.STOP, embedding=row)
            if good
            else _failed(request, "the model produced NaN or infinite values for this text")
            for request, row, good in zip(batch, vectors.tolist(), finite, strict=True)
        ]


def _failed(request: EmbedRequest, message: str) -> SequenceOutput:
    return SequenceOutput(
        request_id=request.request_id, token_ids=[], finish_reason=FinishReason.ERROR, error=message[:500]
    )
