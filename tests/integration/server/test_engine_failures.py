"""A real engine process behind the server, with a model that can be told to misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

from fake_runner import CRASH, HANG, SLOW, greedy, load_fake
from fakes.eventually import eventually
from fakes.running_server import RunningServer, running_server
from octavo_engine.config import EngineConfig
from octavo_engine.process import EngineProcessClient

PROMPT = [1, 2, 3, 4, 5]
LONG = {"prompt": [SLOW, 1, 2], "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@contextlib.asynccontextmanager
async def served(**config: Any) -> AsyncIterator[RunningServer]:
    settings = {"block_size": 4, "num_kv_blocks": 256, "max_num_seqs": 8, "num_threads": 1, **config}
    engine = EngineProcessClient(EngineConfig(model="fake", **settings), load_fake)
    async with running_server(engine) as server:
        yield server


async def status_of(server: RunningServer, path: str) -> int:
    async with server.http.get(server.url + path) as response:
        return response.status


async def test_tokens_pass_through_unchanged() -> None:
    async with served() as server:
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        status, answer, _ = await server.post("/v1/completions", body)

    assert status == 200
    assert answer["choices"][0]["token_ids"] == greedy(PROMPT, 12)


async def test_a_killed_engine_fails_probes_and_ends_streams_with_an_error_event() -> None:
    async with served() as server:
        async with server.http.post(f"{server.url}/v1/completions", json={**LONG, "stream": True}) as response:
            await response.content.readany()
            os.kill(server.engine.pid, signal.SIGKILL)
            events = (await response.text()).strip().split("\n\n")
        async with asyncio.timeout(5):
            while await status_of(server, "/health/ready") == 200:
                await asyncio.sleep(0.05)

        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 503
        assert events[-1] == "data: [DONE]"
        assert await status_of(server, "/health/live") == 503
        status, _, headers = await server.post("/v1/completions", {"prompt": PROMPT})
        assert (status, "retry-after" in headers) == (503, True)


async def test_a_hung_engine_fails_its_liveness() -> None:
    async with served(step_timeout_s=1.5) as server:
        request = asyncio.create_task(server.post("/v1/completions", {"prompt": [HANG, 1]}))
        async with asyncio.timeout(10):
            while await status_of(server, "/health/live") == 200:
                await asyncio.sleep(0.1)
        assert await status_of(server, "/health/ready") == 503
        request.cancel()


async def test_one_failing_request_leaves_its_neighbours_alone() -> None:
    async with served() as server:
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        answers = await asyncio.gather(
            server.post("/v1/completions", body),
            server.post("/v1/completions", {"prompt": [CRASH, 1]}),
            server.post("/v1/completions", body),
        )
        ready = await status_of(server, "/health/ready")

    assert [status for status, _, _ in answers] == [200, 500, 200]
    assert "kernel" not in answers[1][1]["error"]["message"]
    assert answers[0][1]["choices"][0]["token_ids"] == answers[2][1]["choices"][0]["token_ids"] == greedy(PROMPT, 20)
    assert ready == 200


async def test_clients_that_leave_give_every_block_back() -> None:
    async with served(max_num_seqs=4) as server:

        async def leave(index: int) -> None:
            body = {**LONG, "prompt": [SLOW, index], "stream": index % 2 == 0, "n": 1 + index % 2}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02 + 0.03 * (index % 5)):
                    await server.post("/v1/completions", body)

        await asyncio.gather(*(leave(index) for index in range(24)))

        await eventually(lambda: server.engine.stats.num_running == server.engine.stats.num_waiting == 0, 10)
        await eventually(lambda: server.engine.stats.kv_blocks_used == 0, 10)


async def test_a_full_queue_answers_429_at_once_and_recovers() -> None:
    async with served(max_num_seqs=1, max_queued_requests=2) as server:
        running = [asyncio.create_task(server.post("/v1/completions", LONG)) for _ in range(3)]
        await eventually(lambda: server.engine.stats.num_waiting >= 2, 10)

        status, answer, headers = await server.post("/v1/completions", {"prompt": PROMPT})

        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "RateLimitError"
        for request in running:
            request.cancel()
        await eventually(lambda: server.engine.stats.num_running == server.engine.stats.num_waiting == 0, 10)
        assert (await server.post("/v1/completions", {"prompt": PROMPT}))[0] == 200
