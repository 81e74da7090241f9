"""What `LLM` asks of its engine, and one engine in this process as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import AddRequest, EmbedRequest, EngineStats, ModelInfo, SequenceOutput

MAX_WAITING = 256


class OfflineEngine(Protocol):
    """An engine, or several as one, that whoever gives it work also drives. For one thread."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""

    def stats(self) -> EngineStats: ...

    def check_prompt(self, prompt: Sequence[int], room: int = 1) -> None:
        """Raise `InvalidRequestError` for a prompt that cannot run with `room` more tokens."""

    def can_take(self, num_tokens: int) -> bool:
        """Whether a prompt of that length should be added now; if not, step first."""

    def add(self, request: AddRequest) -> None: ...

    def add_embedding(self, request: EmbedRequest) -> None: ...

    def step(self) -> Sequence[SequenceOutput]:
        """Go on, and tell what that gave."""

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def close(self) -> None:
        """Let go of processes; harmless when there are none."""


class OneEngine:
    """Implements `OfflineEngine` over a core in this process."""

    def __init__(self, core: EngineCore, config: EngineConfig) -> None:
        self._core = core
        self._max_waiting = min(config.max_queued_requests, MAX_WAITING)
        self._max_tokens = config.max_queued_tokens
        self.add, self.add_embedding = core.add, core.add_embedding
        self.abort, self.check_prompt, self.stats = core.abort, core.check_prompt, core.stats

    @property
    def model(self) -> ModelInfo:
        return self._core.model

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def can_take(self, num_tokens: int) -> bool:
        """Keeps the scheduler's queue filled without running into its bounds."""
        scheduler = self._core.scheduler
        fits = not scheduler.num_waiting or scheduler.num_waiting_tokens + num_tokens <= self._max_tokens
        return scheduler.num_waiting < self._max_waiting and fits

    def step(self) -> Sequence[SequenceOutput]:
        return self._core.step().outputs

    def close(self) -> None: ...
