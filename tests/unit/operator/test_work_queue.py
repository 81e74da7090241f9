from __future__ import annotations

import asyncio
import contextlib

import pytest

from octavo_operator.api.errors import OctavoOperatorError
from octavo_operator.controller.work_queue import WorkQueue


async def drained(queue: WorkQueue[str], *, seconds: float = 2.0) -> None:
    """Run the workers until nothing is left to do."""
    task = asyncio.create_task(queue.run())
    async with asyncio.timeout(seconds):
        await asyncio.sleep(0)
        while queue.length:
            await asyncio.sleep(0.005)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_key_that_is_added_often_is_handled_once() -> None:
    seen: list[str] = []

    async def work(key: str) -> None:
        seen.append(key)

    queue = WorkQueue[str](work, workers=2)
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    await drained(queue)
    assert sorted(seen) == ["a", "b"]


async def test_a_key_that_changes_while_it_is_handled_is_handled_again_but_never_twice_at_once() -> None:
    running, most, count = 0, 0, 0

    async def work(key: str) -> None:
        nonlocal running, most, count
        running += 1
        most = max(most, running)
        if count == 0:
            queue.add(key)
            queue.add(key)
        await asyncio.sleep(0.01)
        count += 1
        running -= 1

    queue = WorkQueue[str](work, workers=4)
    queue.add("a")
    await drained(queue)
    assert (count, most) == (2, 1)


async def test_a_failure_is_tried_again_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    failures = 3

    async def work(key: str) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OctavoOperatorError("not yet")

    queue = WorkQueue[str](work, workers=1)

    def soon(key: str, delay_s: float) -> None:
        delays.append(delay_s)
        asyncio.get_running_loop().call_soon(queue.add, key)

    monkeypatch.setattr(queue, "add_after", soon)
    queue.add("a")
    task = asyncio.create_task(queue.run())
    async with asyncio.timeout(2):
        while failures or queue.length:
            await asyncio.sleep(0.005)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert delays == [0.5, 1.0, 2.0]


async def test_a_bug_in_one_key_does_not_stop_the_others() -> None:
    seen: list[str] = []

    async def work(key: str) -> None:
        if key == "bad":
            raise ZeroDivisionError
        seen.append(key)

    queue = WorkQueue[str](work, workers=1)
    for key in ("bad", "good"):
        queue.add(key)
    await drained(queue)
    assert seen == ["good"]


async def test_a_key_may_ask_to_be_looked_at_again() -> None:
    looks = 0

    async def work(key: str) -> float | None:
        nonlocal looks
        looks += 1
        return 0.01 if looks < 3 else None

    queue = WorkQueue[str](work, workers=1)
    queue.add("a")
    task = asyncio.create_task(queue.run())
    async with asyncio.timeout(2):
        while looks < 3:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert looks == 3
