"""Run sequences on the engine and turn what it emits into text: the one path every generating face uses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from octavo_engine.client import EngineClient
from octavo_engine.detokenizer import IncrementalDetokenizer
from octavo_engine.errors import OctavoError
from octavo_engine.messages import FinishReason, SequenceOutput, TokenLogprobs
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.caller import Caller
from octavo_server.errors import INTERNAL_ERROR, ApiError, bad_request, from_engine_error
from octavo_server.metrics import RequestLatencies
from octavo_server.telemetry import SequenceFacts, SequenceTimes, Telemetry


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate: `index` tells it from its siblings of the same response."""

    index: int
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    caller: Caller
    cache_salt: str = ""
    priority: int = 0
    adapter: str = ""  # empty: the base model
    continues_prompt: bool = False  # the text is appended to the prompt's own
    shares_prompt: bool = False  # with a sibling that the prompt is already counted for
    operation: str = "text_completion"  # in the words of the GenAI semantic conventions
    resumed_token_ids: tuple[int, ...] = ()  # told by another replica; the sequence goes on after them
    structured_param: str = ""  # the caller's name for what constrains the output


@dataclass(frozen=True, slots=True)
class Delta:
    """What one output added to sequence `index`. The last one carries `finish_reason`.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    replayed: bool = False  # told before, by another replica


class DeltaStream:
    """The deltas of one response. Closing it ends its sequences, even before the first delta was taken."""

    def __init__(self, first: Delta, rest: AsyncGenerator[Delta, None]) -> None:
        self._first: Delta | None = first
        self._rest = rest

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        first, self._first = self._first, None
        return await anext(self._rest) if first is None else first

    async def aclose(self) -> None:
        self._first = None
        await self._rest.aclose()


class Generator:
    """Sequences of one loaded model."""

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, latencies: RequestLatencies, telemetry: Telemetry, model: str
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._latencies = latencies
        self._telemetry = telemetry
        self._model = model

    async def start(self, requests: Sequence[SequenceRequest]) -> DeltaStream:
        """Begin all `requests` and wait for the first delta, so that a refusal still becomes an HTTP status.

        Returns every delta in order of arrival. Closing the returned stream aborts what still runs.
        Raises `ApiError`.
        """
        only_one = sum(not request.shares_prompt for request in requests) == 1
        streams = [self._stream(request, is_labelled=only_one and not request.shares_prompt) for request in requests]
        merged = streams[0] if len(streams) == 1 else _merge(streams)
        try:
            first = await anext(merged)
        except BaseException:
            await merged.aclose()
            raise
        return DeltaStream(first, merged)

    async def _stream(self, request: SequenceRequest, *, is_labelled: bool) -> AsyncGenerator[Delta, None]:
        detokenizer = IncrementalDetokenizer(
            self._tokenizer, request.sampling, continues_prompt=request.continues_prompt
        )
        timing = _Timing(self._latencies, request)
        counted = False
        replayed = self._replay(request, detokenizer)
        outputs = self._engine.generate(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            tenant=request.caller.tenant,
            cache_salt=request.cache_salt,
            priority=request.priority,
            deadline_s=request.caller.deadline_s,
            adapter=request.adapter,
            output_token_ids=request.resumed_token_ids,
            prefix_labels=request.caller.prefix.labels(len(request.prompt_token_ids)) if is_labelled else (),
        )
        try:
            async for output in outputs:
                raise_failure(output)
                timing.received()
                finish = output.finish_reason
                piece = detokenizer.push(output.token_ids, finish is not None)
                token_ids, logprobs = output.token_ids, output.logprobs
                stop_reason: str | int | None = None
                if output.stop_token_id in request.sampling.stop_token_ids:
                    stop_reason = output.stop_token_id
                if piece.stop_reason is not None:
                    finish, stop_reason = FinishReason.STOP, piece.stop_reason
                    token_ids = token_ids[: piece.num_tokens]
                    logprobs = None if logprobs is None else logprobs[: piece.num_tokens]
                timing.observe(output, finish)
                if not counted and token_ids:
                    counted = True
                    _count_prompt(request, output)
                    if replayed is not None:
                        yield replayed
                request.caller.consumed.output_tokens += len(token_ids)
                yield Delta(
                    index=request.index,
                    text=piece.text,
                    token_ids=token_ids,
                    logprobs=logprobs,
                    prompt_logprobs=output.prompt_logprobs,
                    finish_reason=finish,
                    stop_reason=stop_reason,
                    num_cached_tokens=output.num_cached_tokens,
                )
                if finish is not None:
                    return
        except OctavoError as error:
            raise _in_callers_words(from_engine_error(error), request.structured_param) from error
        finally:
            await _close(outputs)
            if self._telemetry.enabled:
                self._telemetry.sequence(request.caller.trace_context, timing.facts(self._model), timing.times())

    def _replay(self, request: SequenceRequest, detokenizer: IncrementalDetokenizer) -> Delta | None:
        """Bring the text to where another replica left it."""
        token_ids = list(request.resumed_token_ids)
        if not token_ids:
            return None
        piece = detokenizer.push(token_ids, False)
        if piece.stop_reason is not None:
            raise bad_request("octavo_resume: the answer has already ended with these tokens", "octavo_resume")
        return Delta(request.index, piece.text, token_ids, replayed=True)


class _Timing:
    """Latencies of one sequence."""

    def __init__(self, latencies: RequestLatencies, request: SequenceRequest) -> None:
        self._latencies = latencies
        self._request = request
        self._submitted_at = time.monotonic()
        self._first_at: float | None = None
        self._previous_at = self._last_output_at = self._submitted_at
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._last: SequenceOutput | None = None
        self._finish_reason: FinishReason | None = None

    def received(self) -> None:
        """The engine has told something; turning it into text is still to be done."""
        self._last_output_at = time.monotonic()

    def observe(self, output: SequenceOutput, finish_reason: FinishReason | None) -> None:
        now = time.monotonic()
        if output.token_ids:
            if self._first_at is None:
                self._first_at = now
                self._latencies.ttft(now - self._request.caller.arrived_at)
            else:
                self._latencies.itl(now - self._previous_at)
            self._num_tokens += len(output.token_ids)
        self._previous_at = now
        self._num_cached_tokens = output.num_cached_tokens or self._num_cached_tokens
        self._last = output
        if finish_reason is not None:
            self._finish_reason = finish_reason
            self._finish(output, now)

    def _finish(self, output: SequenceOutput, now: float) -> None:
        latencies = self._latencies
        latencies.e2e(now - self._request.caller.arrived_at)
        latencies.queue_time(output.queue_time_s)
        latencies.prompt_tokens(len(self._request.prompt_token_ids))
        latencies.generation_tokens(self._num_tokens)
        if self._num_tokens > 1 and self._first_at is not None:
            latencies.tpot((now - self._first_at) / (self._num_tokens - 1))

    def times(self) -> SequenceTimes:
        return SequenceTimes(
            self._request.caller.arrived_at,
            self._submitted_at,
            0.0 if self._last is None else self._last.queue_time_s,
            self._first_at,
            self._last_output_at,
            time.monotonic(),
        )

    def facts(self, model: str) -> SequenceFacts:
        request, reason = self._request, self._finish_reason
        return SequenceFacts(
            operation=request.operation,
            model=model,
            request_id=request.request_id,
            sampling=request.sampling,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=self._num_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_preemptions=0 if self._last is None else self._last.num_preemptions,
            finish_reason="abort" if reason is None else reason.value,
            failed=reason is None,
        )


def _count_prompt(request: SequenceRequest, output: SequenceOutput) -> None:
    """A prompt counts with its first token, as in the engine's own counters, and once for all its sequences."""
    if not request.shares_prompt:
        request.caller.consumed.prompt_tokens += len(request.prompt_token_ids)
        request.caller.consumed.cached_tokens += min(output.num_cached_tokens, len(request.prompt_token_ids))
        request.caller.consumed.output_tokens += len(request.resumed_token_ids)


def raise_failure(output: SequenceOutput) -> None:
    """Raise the `ApiError` that a failed output stands for."""
    if output.finish_reason is FinishReason.DEADLINE:
        raise ApiError(504, "The request's deadline passed before it finished.", reason="deadline")
    if output.finish_reason is FinishReason.ERROR:
        raise ApiError(500, INTERNAL_ERROR, reason="engine_error")


def _in_callers_words(error: ApiError, structured_param: str) -> ApiError:
    if error.param != "structured" or not structured_param:
        return error
    return bad_request(f"{structured_param}: {error.message.partition(': ')[2]}", structured_param)


async def _close(outputs: AsyncIterator[SequenceOutput]) -> None:
    if isinstance(outputs, AsyncGenerator):
        await outputs.aclose()


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Interleave several streams; the first failure ends them all, and so does closing this generator."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
