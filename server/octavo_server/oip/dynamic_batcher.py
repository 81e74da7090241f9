"""Put requests that arrive together into one call of a model, and take its results apart again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
RunModel = Callable[[Arrays], list[Array]]


@dataclass(frozen=True, slots=True)
class _Pending:
    """One request: arrays whose first dimension is `rows` long, and who waits for the results."""

    inputs: Arrays
    rows: int
    signature: tuple[tuple[str, str, tuple[int, ...]], ...]
    result: asyncio.Future[list[Array]]


class DynamicBatcher:
    """Runs at most `max_rows` rows a call on one thread; while it is busy, arrivals gather for the next call.

    `max_delay_s` is how long a first request waits for company when the model is idle.
    """

    def __init__(self, run: RunModel, *, max_rows: int = 64, max_delay_s: float = 0.001) -> None:
        self._run = run
        self._max_rows = max_rows
        self._max_delay_s = max_delay_s
        self._pending: list[_Pending] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-model")
        self._worker: asyncio.Task[None] | None = None
        self.num_calls = 0

    async def submit(self, inputs: Arrays) -> list[Array]:
        """The model's outputs for these rows alone. Raises what the model raises."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        rows = next((len(array) for array in inputs.values() if array.ndim), 1)
        signature = tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in inputs.items()))
        pending = _Pending(inputs, rows, signature, asyncio.get_running_loop().create_future())
        self._pending.append(pending)
        self._arrived.set()
        return await pending.result

    def close(self) -> None:
        """Refuse what waits and end the thread."""
        if self._worker is not None:
            self._worker.cancel()
        for pending in self._pending:
            pending.result.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if sum(pending.rows for pending in self._pending) < self._max_rows:
                await asyncio.sleep(self._max_delay_s)
            self._pending = [pending for pending in self._pending if not pending.result.done()]
            batch, self._pending = take_batch(self._pending, self._max_rows)
            if not self._pending:
                self._arrived.clear()
            if batch:
                await self._call(batch)

    async def _call(self, batch: Sequence[_Pending]) -> None:
        self.num_calls += 1
        inputs = {
            name: np.concatenate([pending.inputs[name] for pending in batch]) if len(batch) > 1 else array
            for name, array in batch[0].inputs.items()
        }
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, inputs)
            total = sum(pending.rows for pending in batch)
            if len(batch) > 1 and any(len(output) != total for output in outputs):
                raise ValueError("the model's outputs do not follow the rows of its inputs")
        except Exception as error:
            if len(batch) > 1:  # one of them may be at fault; the others get their results
                for pending in batch:
                    await self._call([pending])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        start = 0
        for pending in batch:
            own = outputs if len(batch) == 1 else [output[start : start + pending.rows] for output in outputs]
            start += pending.rows
            if not pending.result.done():
                pending.result.set_result(own)


def take_batch(pending: Sequence[_Pending], max_rows: int) -> tuple[list[_Pending], list[_Pending]]:
    """The oldest request and every later one of its shape that still fits; and the rest, in order."""
    batch: list[_Pending] = []
    rest: list[_Pending] = []
    rows = 0
    for request in pending:
        fits = not batch or (request.signature == batch[0].signature and rows + request.rows <= max_rows)
        if fits:
            batch.append(request)
            rows += request.rows
        else:
            rest.append(request)
    return batch, rest
