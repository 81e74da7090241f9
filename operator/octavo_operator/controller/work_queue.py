"""Keys waiting to be reconciled: each at most once, never two at a time, failures later and later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

log = logging.getLogger("octavo.operator.queue")
K = TypeVar("K")
BACK_OFF_FIRST_S = 0.5
BACK_OFF_MAX_S = 60.0


class WorkQueue(Generic[K]):
    """Level-triggered: however often a key is added while it waits or runs, it runs once more, not many times."""

    def __init__(self, work: Callable[[K], Awaitable[float | None]], workers: int) -> None:
        """`work` handles a key and may return after how many seconds to look again; it raises to be retried."""
        self._work = work
        self._workers = workers
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()
        self._running: set[K] = set()
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self.handled = 0  # for metrics; failures included
        self.failed = 0

    def add(self, key: K) -> None:
        """Handle a key soon."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Handle a key later; a later call replaces the delay."""
        self._cancel(key)
        self._timers[key] = asyncio.get_running_loop().call_later(delay_s, self._fire, key)

    @property
    def length(self) -> int:
        """Keys that wait or run."""
        return len(self._waiting) + len(self._running)

    async def run(self) -> None:
        """Run the workers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._worker())

    async def _worker(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._running.add(key)
            try:
                await self._handle(key)
            finally:
                self._running.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)

    async def _handle(self, key: K) -> None:
        self.handled += 1
        try:
            again_s = await self._work(key)
        except Exception as error:  # the one place where any failure becomes a retry; it is logged and counted
            self.failed += 1
            count = self._failures[key] = self._failures.get(key, 0) + 1
            delay = min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2 ** (count - 1))
            known = isinstance(error, OSError) or type(error).__module__.startswith("octavo_")
            log.warning("%s: %s; trying again in %.1f s", key, error, delay, exc_info=not known)
            self.add_after(key, delay)
            return
        self._failures.pop(key, None)
        if again_s is None:
            self._cancel(key)
        else:
            self.add_after(key, again_s)

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _cancel(self, key: K) -> None:
        with contextlib.suppress(KeyError):
            self._timers.pop(key).cancel()
