"""Several engines in child processes, driven without an event loop of the caller's own, as `LLM` drives one."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from octavo_engine.config import EngineConfig
from octavo_engine.errors import QueueFullError
from octavo_engine.messages import AddRequest, EmbedRequest, EngineStats, LoadProgress, ModelInfo, SequenceOutput
from octavo_engine.process.data_parallel import DataParallelClient
from octavo_engine.prompt import check_prompt
from octavo_engine.startup import LoadRunner

T = TypeVar("T")
PROGRESS_INTERVAL_S = 0.2
QUEUED_EACH = 32  # requests that wait in an engine, so that none runs dry
SHUTDOWN_S = 5.0


class OfflineEngines:
    """Implements `OfflineEngine` over `DataParallelClient`, whose event loop runs in a thread.

    Raises what starting an engine raises. `step` raises `EngineDeadError` when one of the engines has died.
    """

    def __init__(
        self, config: EngineConfig, on_progress: Callable[[LoadProgress], None], load: LoadRunner | None = None
    ) -> None:
        self._client = DataParallelClient(config, load)
        self._room = config.data_parallel_size * (config.max_num_seqs + QUEUED_EACH)
        self._outputs: queue.SimpleQueue[SequenceOutput | Exception] = queue.SimpleQueue()
        self._running: dict[str, Future[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="octavo-engines", daemon=True)
        self._thread.start()
        starting = self._submit(self._client.start())
        try:
            while not starting.done():
                if (progress := self._client.progress) is not None:
                    on_progress(progress)
                time.sleep(PROGRESS_INTERVAL_S)
            starting.result()
        except BaseException:
            starting.cancel()
            self._end_loop()
            raise

    @property
    def model(self) -> ModelInfo:
        return self._client.model

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def stats(self) -> EngineStats:
        return self._client.stats

    def check_prompt(self, prompt: Sequence[int], room: int = 1) -> None:
        check_prompt(prompt, self.model, room)

    def can_take(self, _num_tokens: int) -> bool:
        return len(self._running) < self._room

    def add(self, request: AddRequest) -> None:
        self._running[request.request_id] = self._submit(self._generate(request))

    def add_embedding(self, request: EmbedRequest) -> None:
        self._running[request.request_id] = self._submit(self._embed(request))

    def step(self) -> list[SequenceOutput]:
        """Everything told since the last call; waits for at least one output."""
        found = [self._outputs.get()]
        while not self._outputs.empty():
            found.append(self._outputs.get())
        outputs = []
        for item in found:
            if isinstance(item, Exception):
                raise item
            if item.finish_reason is not None:
                self._running.pop(item.request_id, None)
            outputs.append(item)
        return outputs

    def abort(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            if (running := self._running.pop(name, None)) is not None:
                running.cancel()

    def close(self) -> None:
        """End the engines; nothing may be asked afterwards."""
        if self._loop.is_closed():
            return
        self.abort(list(self._running))
        self._submit(self._client.shutdown(SHUTDOWN_S)).result()
        self._end_loop()

    async def _generate(self, request: AddRequest) -> None:
        async def run() -> None:
            async for output in self._client.generate(
                request_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                adapter=request.adapter,
            ):
                self._outputs.put(output)

        await self._told(run)

    async def _embed(self, request: EmbedRequest) -> None:
        async def run() -> None:
            self._outputs.put(
                await self._client.embed(request_id=request.request_id, prompt_token_ids=request.prompt_token_ids)
            )

        await self._told(run)

    async def _told(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a request to its end and tell its error, whatever it is; a full queue is waited for."""
        while True:
            try:
                return await run()
            except QueueFullError as error:
                await asyncio.sleep(min(error.retry_after_s, 1.0))
            except Exception as error:  # an error that is not told would leave `step` waiting
                return self._outputs.put(error)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
