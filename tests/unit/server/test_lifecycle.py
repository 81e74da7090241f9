"""Admission by phase, and drains."""

from __future__ import annotations

import asyncio

import pytest

from octavo_server.errors import ApiError
from octavo_server.lifecycle import InFlight, Lifecycle, Phase


def ready() -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.become_ready()
    return lifecycle


async def test_nothing_is_admitted_before_ready_or_after_failure() -> None:
    starting, failed = Lifecycle(), ready()
    failed.fail("out of memory")

    for lifecycle in (starting, failed):
        with pytest.raises(ApiError) as caught:
            lifecycle.admit(InFlight("a"))
        assert caught.value.status == 503
        assert caught.value.retry_after_s is not None
        assert lifecycle.num_in_flight == 0


async def test_a_failed_replica_never_becomes_ready_again() -> None:
    lifecycle = Lifecycle()
    lifecycle.fail("x")
    lifecycle.become_ready()

    assert lifecycle.phase is Phase.FAILED


async def test_an_idle_drain_ends_right_after_the_propagation() -> None:
    lifecycle = ready()

    assert await lifecycle.drain(0.01, 100.0) is True
    assert lifecycle.phase is Phase.REFUSING


async def test_a_drain_waits_for_what_runs() -> None:
    lifecycle = ready()
    request = InFlight("a")
    lifecycle.admit(request)
    drain = asyncio.create_task(lifecycle.drain(0.0, 100.0))
    await asyncio.sleep(0.01)
    assert not drain.done()

    lifecycle.release(request)

    assert await drain is True


async def test_stopping_a_request_cancels_its_task_once_with_the_first_cause() -> None:
    request = InFlight("a")
    task = asyncio.create_task(asyncio.sleep(10))
    request.bind(task)
    first = ApiError(504, "late")

    request.stop(first)
    request.stop(ApiError(503, "later"))
    with pytest.raises(asyncio.CancelledError):
        await task

    assert request.stop_cause is first
