"""Outputs of one sequence between the engine's messages and their consumer."""

from __future__ import annotations

import asyncio

from octavo_engine.messages import SequenceOutput


class OutputStream:
    """Holds what the consumer has not taken yet as one merged output, so a slow reader costs its own tokens only."""

    def __init__(self) -> None:
        self._pending: SequenceOutput | None = None
        self._error: Exception | None = None
        self._wakeup = asyncio.Event()
        self.started = False

    def put(self, output: SequenceOutput) -> None:
        self._pending = output if self._pending is None else merge(self._pending, output)
        self.started = True
        self._wakeup.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is already there."""
        self._error = error
        self._wakeup.set()

    async def get(self) -> SequenceOutput:
        """The tokens since the last call; waits for at least one message."""
        while self._pending is None:
            if self._error is not None:
                raise self._error
            self._wakeup.clear()
            await self._wakeup.wait()
        output, self._pending = self._pending, None
        return output


def merge(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two consecutive outputs of one sequence as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *(second.logprobs or [])]
    return SequenceOutput(
        request_id=first.request_id,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs if first.prompt_logprobs is not None else second.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        num_preemptions=max(first.num_preemptions, second.num_preemptions),
        queue_time_s=max(first.queue_time_s, second.queue_time_s),
        embedding=second.embedding,
        error=second.error,
        error_kind=second.error_kind,
        error_param=second.error_param,
        retry_after_s=second.retry_after_s,
    )
