"""An engine without a model: answers with a text of the test's choosing, one token a step, and keeps books."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fakes.byte_tokenizer import EOS, ByteTokenizer
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineDeadError, OctavoError, QueueFullError
from octavo_engine.messages import (
    EngineStats,
    FinishReason,
    LoadProgress,
    ModelInfo,
    SequenceOutput,
    TokenLogprobs,
)
from octavo_engine.prompt import check_resumed
from octavo_engine.sampling_params import SamplingParams

MODEL_NAME = "fake-model"
BLOCK_SIZE = 16


@dataclass
class Received:
    """What the engine was asked for."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    tenant: str
    cache_salt: str
    priority: int
    deadline_s: float | None
    adapter: str = ""
    prefix_labels: Sequence[tuple[int, int]] = ()


@dataclass
class FakeEngine:
    """`reply` maps the prompt's text to the answer; `step_s` is the time of one token."""

    reply: Callable[[str], str] = lambda prompt: "Hello from the fake engine!"
    step_s: float = 0.0
    load_s: float = 0.0
    load_error: OctavoError | None = None
    max_queued: int = 1_000
    max_model_len: int = 4_096
    task: str = "generate"
    path: str = "/nowhere/fake"
    fail_after: int | None = None
    received: dict[str, Received] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)  # request id -> blocks held
    finished: Counter[str] = field(default_factory=Counter)
    dead: str | None = None
    closed: bool = False
    steps: int = 0
    generated: int = 0
    _ready: bool = False
    _progress: LoadProgress | None = None

    @property
    def model(self) -> ModelInfo:
        if not self._ready:
            raise EngineDeadError("the engine is not ready")
        return ModelInfo(
            name=MODEL_NAME, path=self.path, architecture="Fake", task=self.task,
            max_model_len=self.max_model_len, vocab_size=ByteTokenizer.vocab_size, hidden_size=8,
            eos_token_ids=[EOS], dtype="float32", quantization="none", device="cpu", backend="fake",
            num_parameters=1, weight_bytes=4, kv_block_size=BLOCK_SIZE, kv_blocks_total=1_024, kv_bytes_per_token=1,
        )  # fmt: skip

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            step=self.steps,
            num_running=len(self.running),
            num_waiting=0,
            kv_blocks_total=1_024,
            kv_blocks_used=sum(self.running.values()),
            generation_tokens=self.generated,
            requests_finished=dict(self.finished),
        )

    @property
    def progress(self) -> LoadProgress | None:
        return self._progress

    async def start(self) -> None:
        self._progress = LoadProgress(phase="weights", fraction=0.5, detail="1 of 2 files")
        await asyncio.sleep(self.load_s)
        if self.load_error is not None:
            raise self.load_error
        self._progress = None
        self._ready = True

    def check_health(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def check_room(self) -> None:
        if len(self.running) >= self.max_queued:
            raise QueueFullError("the queue is full (1000 requests wait)", 3.2)

    async def generate(
        self,
        *,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        tenant: str = "",
        cache_salt: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
        adapter: str = "",
        output_token_ids: Sequence[int] = (),
        prefix_labels: Sequence[tuple[int, int]] = (),
    ) -> AsyncIterator[SequenceOutput]:
        assert request_id not in self.received, "request ids must be unique"
        check_resumed(prompt_token_ids, output_token_ids, sampling, self.model)
        self.check_room()
        self.received[request_id] = Received(
            prompt_token_ids, sampling, tenant, cache_salt, priority, deadline_s, adapter, prefix_labels
        )
        self.running[request_id] = len(prompt_token_ids) // BLOCK_SIZE + 1
        reason = FinishReason.ABORT
        try:
            async for output in self._tokens(request_id, prompt_token_ids, sampling, len(output_token_ids)):
                reason = output.finish_reason or reason
                yield output
        finally:
            del self.running[request_id]
            self.finished[reason.value] += 1

    async def _tokens(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingParams, num_resumed: int
    ) -> AsyncIterator[SequenceOutput]:
        prompt = ByteTokenizer().decode(prompt_token_ids)
        answer = [*self.reply(prompt).encode(), EOS]
        for position in range(num_resumed, sampling.max_tokens):
            await asyncio.sleep(self.step_s)
            self.steps += 1
            self.generated += 1
            self.check_health()
            token = answer[position % len(answer)]
            finish, stop = None, None
            if token == EOS and not sampling.ignore_eos:
                finish = FinishReason.STOP
            elif token in sampling.stop_token_ids:
                finish, stop = FinishReason.STOP, token
            elif position + 1 == sampling.max_tokens:
                finish = FinishReason.LENGTH
            if self.fail_after == position:
                yield SequenceOutput(request_id=request_id, token_ids=[], finish_reason=FinishReason.ERROR, error="x")
                return
            yield SequenceOutput(
                request_id=request_id,
                token_ids=[token],
                finish_reason=finish,
                stop_token_id=stop,
                logprobs=None if sampling.logprobs is None else [_logprobs(token, sampling.logprobs)],
                prompt_logprobs=_prompt_logprobs(prompt_token_ids, sampling) if position == num_resumed else None,
                num_cached_tokens=(len(prompt_token_ids) // BLOCK_SIZE * BLOCK_SIZE if position == num_resumed else 0),
            )
            if finish is not None:
                return

    async def embed(
        self, *, request_id: str, prompt_token_ids: list[int], second_start: int = 0, tenant: str = ""
    ) -> SequenceOutput:
        total = sum(prompt_token_ids)
        vector = [float((total * (i + 1)) % 7 - 3) for i in range(8)]
        norm = sum(value * value for value in vector) ** 0.5 or 1.0
        return SequenceOutput(
            request_id=request_id,
            token_ids=[],
            finish_reason=FinishReason.STOP,
            embedding=[value / norm for value in vector],
        )

    async def shutdown(self, timeout_s: float) -> None:
        self.closed = True


def fake_engine_factory(engine: FakeEngine) -> Callable[[EngineConfig], Any]:
    return lambda config: engine


def _logprobs(token: int, count: int) -> TokenLogprobs:
    top = [(token, -0.25), *((other, -2.0 - other) for other in range(65, 65 + count - 1))] if count else []
    return TokenLogprobs(token_id=token, logprob=-0.25, rank=1, top=top)


def _prompt_logprobs(prompt_token_ids: list[int], sampling: SamplingParams) -> list[TokenLogprobs | None] | None:
    if sampling.prompt_logprobs is None:
        return None
    return [None, *(_logprobs(token, sampling.prompt_logprobs) for token in prompt_token_ids[1:])]
