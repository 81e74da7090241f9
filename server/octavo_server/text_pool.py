"""A bounded pool of threads for work on text (templates, tokenizing) that must not stall the event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from octavo_server.errors import ApiError

P = ParamSpec("P")
R = TypeVar("R")


class TextPool:
    """At most `num_threads` calls at a time and `max_pending` in all; more is refused with a 429."""

    def __init__(self, num_threads: int = 2, max_pending: int = 2_048) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="octavo-text")
        self._max_pending = max_pending
        self._pending = 0

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` on a thread of the pool and return its result."""
        if self._pending >= self._max_pending:
            raise ApiError(
                429, "Too many prompts wait to be tokenized; retry shortly.", retry_after_s=1.0, reason="text_pool_full"
            )
        self._pending += 1
        future = asyncio.get_running_loop().run_in_executor(
            self._executor, functools.partial(function, *args, **kwargs)
        )
        future.add_done_callback(self._done)
        return await future

    def close(self) -> None:
        """Drop what has not started; does not wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self, _: asyncio.Future[R]) -> None:
        self._pending -= 1
