"""The seam between network faces and the engine: what every server may ask of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from octavo_engine.messages import EngineStats, LoadProgress, ModelInfo, SchedulerSnapshot, SequenceOutput
from octavo_engine.sampling_params import SamplingParams


class EngineClient(Protocol):
    """An engine as the API process sees it. Implementations: `EngineProcessClient`, and fakes in tests."""

    @property
    def model(self) -> ModelInfo:
        """The loaded model; raises `EngineDeadError` before the engine is ready."""

    @property
    def stats(self) -> EngineStats:
        """The newest snapshot the engine sent."""

    @property
    def progress(self) -> LoadProgress | None:
        """Where start-up stands; None once ready."""

    async def start(self) -> None:
        """Spawn the engine and wait until it is ready; raises `ModelLoadError`, `ConfigError` or `EngineDeadError`."""

    def check_health(self) -> None:
        """Raise `EngineDeadError` with the cause if the process is gone or its step counter stands still under load."""

    def check_room(self) -> None:
        """Raise at once what `generate` would raise at once, whatever the request: `QueueFullError` and the like."""

    def generate(
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
        """Yield outputs until one carries a finish reason. Closing the iterator early aborts the sequence.

        With `output_token_ids`, generated elsewhere before, the sequence goes on after them; only new tokens are told.
        `prefix_labels`: see `AddRequest`.

        Raises `QueueFullError` at once when the waiting queue is full, `InvalidRequestError` for a prompt that
        cannot fit, `EngineDrainingError` while draining and `EngineDeadError` if the engine dies meanwhile.
        """

    async def embed(
        self, *, request_id: str, prompt_token_ids: list[int], second_start: int = 0, tenant: str = ""
    ) -> SequenceOutput:
        """Pool one text into a vector, or classify it (`SequenceOutput.embedding`); see `EmbedRequest`."""

    async def load_adapter(self, *, request_id: str, name: str, path: str, replace: bool = False) -> None:
        """Load an adapter, or replace one; raises `InvalidRequestError`. `stats.adapters` names it afterwards."""

    async def unload_adapter(self, *, request_id: str, name: str) -> None:
        """Take an adapter out; returns once the sequences that used it have ended. Raises `InvalidRequestError`."""

    async def snapshot(self, *, request_id: str) -> list[SchedulerSnapshot]:
        """What each engine's scheduler holds, once its present step has ended. Raises `EngineDeadError`."""

    async def shutdown(self, timeout_s: float) -> None:
        """Stop the engine process; it is killed when it has not ended after `timeout_s`."""
