"""However a request ends, its sequences end with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]
ENDLESS = {"ignore_eos": True, "max_tokens": 4_000, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_a_stream_frees_its_blocks_within_two_steps(serve: Serve, n: int) -> None:
    server = await serve(FakeEngine(step_s=0.02))

    async with server.http.post(
        f"{server.url}/v1/chat/completions", json={**ENDLESS, "stream": True, "n": n}
    ) as response:
        await response.content.readany()
        assert server.engine.stats.kv_blocks_used > 0
        response.close()
    await eventually(lambda: server.replica.lifecycle.num_in_flight == 0)

    assert server.engine.running == {}
    assert server.engine.stats.kv_blocks_used == 0
    assert server.engine.finished == {"abort": n}
    steps = server.engine.steps
    await asyncio.sleep(0.1)
    assert server.engine.steps == steps


async def test_a_client_that_leaves_a_whole_request_frees_its_blocks(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.02))

    request = asyncio.create_task(server.post("/v1/chat/completions", {**ENDLESS, "n": 2}))
    await eventually(lambda: len(server.engine.running) == 2)
    request.cancel()

    await eventually(lambda: server.engine.running == {})


async def test_many_random_cancels_leave_nothing_behind(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.001))

    async def one(index: int) -> None:
        body = {**ENDLESS, "stream": index % 2 == 0, "n": 1 + index % 3}
        timeout = aiohttp.ClientTimeout(total=0.005 + (index * 7 % 40) / 1_000)
        with contextlib.suppress(TimeoutError):
            async with server.http.post(f"{server.url}/v1/chat/completions", json=body, timeout=timeout) as response:
                await response.read()
                pytest.fail("the request ended by itself")

    for start in range(0, 300, 30):
        await asyncio.gather(*(one(start + i) for i in range(30)))

    await eventually(lambda: server.engine.running == {} and server.replica.lifecycle.num_in_flight == 0)


async def test_a_request_beyond_its_time_ends_with_504(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.05), request_timeout=0.2)

    status, body, _ = await server.post("/v1/chat/completions", ENDLESS)

    assert status == 504
    assert body["error"]["type"] == "DeadlineExceededError"
    await eventually(lambda: server.engine.running == {})


async def test_a_stream_beyond_its_time_ends_with_an_error_event(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.05), request_timeout=0.3)

    async with server.http.post(f"{server.url}/v1/chat/completions", json={**ENDLESS, "stream": True}) as response:
        events = (await response.text()).strip().split("\n\n")

    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 504
    assert events[-1] == "data: [DONE]"


async def test_draining_finishes_what_runs_and_refuses_what_comes(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.02))
    body = {"messages": ENDLESS["messages"], "stream": True}

    async with server.http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
        draining = asyncio.create_task(server.replica.lifecycle.drain(0.1, 5.0))
        await asyncio.sleep(0)
        async with server.http.get(f"{server.url}/health/ready") as ready:
            assert ready.status == 503
        early = asyncio.create_task(server.post("/v1/chat/completions", {**body, "stream": False}))
        await asyncio.sleep(0.2)
        late_status, _, late_headers = await server.post("/v1/chat/completions", {**body, "stream": False})
        text = await response.text()

    assert text.endswith("data: [DONE]\n\n")
    assert (await early)[0] == 200
    assert late_status == 503
    assert late_headers["retry-after"] == "1"
    assert await draining is True


async def test_a_drain_that_takes_too_long_ends_streams_with_an_error_event(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.02))

    async with server.http.post(f"{server.url}/v1/chat/completions", json={**ENDLESS, "stream": True}) as response:
        await response.content.readany()
        complete = await server.replica.lifecycle.drain(0.0, 0.1)
        events = (await response.text()).strip().split("\n\n")

    assert complete is False
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 503
    assert events[-1] == "data: [DONE]"
    assert server.engine.running == {}
