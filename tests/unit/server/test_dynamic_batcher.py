"""Requests that arrive together share a call, and each gets its own rows back."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from octavo_server.oip.dynamic_batcher import Array, Arrays, DynamicBatcher


def double(inputs: Arrays) -> list[Array]:
    return [inputs["x"] * 2]


def rows(*values: float) -> dict[str, Array]:
    return {"x": np.array([[value] for value in values])}


async def test_each_request_gets_its_own_rows() -> None:
    batcher = DynamicBatcher(double)

    results = await asyncio.gather(*(batcher.submit(rows(*range(i, i + 1 + i % 3))) for i in range(40)))

    for i, (result,) in enumerate(results):
        assert result.reshape(-1).tolist() == [2.0 * value for value in range(i, i + 1 + i % 3)]
    assert batcher.num_calls <= 5
    batcher.close()


async def test_arrivals_gather_while_the_model_is_busy() -> None:
    release, sizes = threading.Event(), []

    def run(inputs: Arrays) -> list[Array]:
        sizes.append(len(inputs["x"]))
        release.wait(5)
        return [inputs["x"]]

    batcher = DynamicBatcher(run, max_rows=8)
    first = asyncio.create_task(batcher.submit(rows(0)))
    while not sizes:
        await asyncio.sleep(0.005)
    others = [asyncio.create_task(batcher.submit(rows(i))) for i in range(10)]
    await asyncio.sleep(0.01)
    release.set()
    await asyncio.gather(first, *others)

    assert sizes == [1, 8, 2]
    batcher.close()


async def test_other_shapes_are_called_apart() -> None:
    shapes = []

    def run(inputs: Arrays) -> list[Array]:
        shapes.append(inputs["x"].shape)
        return [inputs["x"]]

    batcher = DynamicBatcher(run)
    await asyncio.gather(*(batcher.submit({"x": np.zeros((1, width))}) for width in (2, 3, 2, 3)))

    assert sorted(shapes) == [(2, 2), (2, 3)]
    batcher.close()


async def test_a_failing_call_fails_its_requests_and_no_later_one() -> None:
    def run(inputs: Arrays) -> list[Array]:
        if inputs["x"].min() < 0:
            raise RuntimeError("negative")
        return [inputs["x"]]

    batcher = DynamicBatcher(run)
    with pytest.raises(RuntimeError, match="negative"):
        await batcher.submit(rows(-1))

    assert (await batcher.submit(rows(1)))[0].tolist() == [[1.0]]
    batcher.close()


async def test_a_caller_that_left_costs_nothing() -> None:
    batcher = DynamicBatcher(double, max_delay_s=0.05)
    gone = asyncio.create_task(batcher.submit(rows(1)))
    await asyncio.sleep(0)
    gone.cancel()

    assert (await batcher.submit(rows(2)))[0].tolist() == [[4.0]]
    assert batcher.num_calls == 1
    batcher.close()
