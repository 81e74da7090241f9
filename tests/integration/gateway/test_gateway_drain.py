"""Graceful shutdown, health pages and metrics."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings


async def test_a_drain_finishes_running_streams_and_refuses_new_requests() -> None:
    replica = OpenAIReplica(tokens=20, token_delay=0.05)
    async with replica.serve(), open_door(entry(replica)) as door:
        running = [asyncio.ensure_future(door.events(HELLO)) for _ in range(10)]
        await until(lambda: replica.running == 10)
        stopping = asyncio.ensure_future(door.server.stop(10))
        await until(lambda: door.server.app.draining)
        status, text, headers = await door.read(HELLO)
        async with door.http.get(f"{door.url}/health/ready") as response:
            ready = response.status
        async with door.http.get(f"{door.url}/health/live") as response:
            live = response.status
        texts = await asyncio.gather(*running)
        await stopping

    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(text)["error"]["code"] == "gateway_draining"
    assert (ready, live) == (503, 200)
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)


async def test_streams_beyond_the_drain_time_end_with_an_explicit_error() -> None:
    replica = OpenAIReplica(tokens=1_000, token_delay=0.05)
    async with replica.serve(), open_door(entry(replica)) as door:
        running = asyncio.ensure_future(door.events(HELLO))
        await until(lambda: replica.running == 1)
        await door.server.stop(0.2)
        text = await running
        await until(lambda: replica.disconnects == 1)

    assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "gateway_draining"


async def test_readiness_says_no_before_requests_are_refused() -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), drain_propagation=0.5) as door:
        stopping = asyncio.ensure_future(door.server.stop(5))
        await until(lambda: door.server.app.leaving)
        async with door.http.get(f"{door.url}/health/ready") as response:
            ready = response.status
        status, _, _ = await door.read(HELLO)
        await stopping

    assert (ready, status) == (503, 200)


async def test_a_gateway_is_ready_once_discovery_has_spoken() -> None:
    registry = Registry()
    server = GatewayServer(GatewaySettings(port=0), registry)
    await server.start()
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{server.address}/health/ready") as response:
            before = response.status
        registry.publish([])
        async with http.get(f"{server.address}/health/ready") as response:
            after = response.status
    await server.stop()

    assert (before, after) == (503, 200)


async def test_a_taken_port_is_told_in_words() -> None:
    async with open_door() as door:
        second = GatewayServer(GatewaySettings(port=door.server.port), Registry())
        with pytest.raises(ConfigError, match="choose another port"):
            await second.start()


async def test_metrics_count_requests_by_model_and_outcome() -> None:
    async with OpenAIReplica("r").serve() as replica, open_door(entry(replica)) as door:
        await door.read(HELLO)
        await door.read(HELLO | {"model": "made-up-1"})
        await door.read(HELLO | {"model": "made-up-2"})
        async with door.http.get(f"{door.url}/metrics") as response:
            page = await response.text()

    assert 'octavo_gateway_requests_total{model="m",outcome="ok",status="200"} 1.0' in page
    assert 'octavo_gateway_requests_total{model="",outcome="refused",status="404"} 2.0' in page
    assert 'octavo_gateway_endpoints{model="m",namespace="",state="ready"} 1.0' in page
    assert "made-up" not in page


async def test_the_access_log_tells_times_and_never_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = {"model": "m", "messages": [{"role": "user", "content": "CANARY-PROMPT"}]}
    async with OpenAIReplica("CANARY-ANSWER").serve() as replica, open_door(entry(replica)) as door:
        await door.read(secret)
        await door.events(secret)
        await door.read(secret | {"model": 7})
        replica.die_after = 1
        await door.events(secret)
        replica.refuse_with = 500
        await door.read(secret)

    lines = [r.getMessage() for r in caplog.records if r.name == "octavo.gateway.access"]
    assert len(lines) == 5
    first = json.loads(lines[0])
    assert {"request_id", "trace_id", "duration_ms", "first_byte_ms", "replica", "route"} <= set(first)
    ours = "".join(r.getMessage() + (r.exc_text or "") for r in caplog.records if r.name.startswith("octavo"))
    assert "CANARY-PROMPT" not in ours
    assert "CANARY-ANSWER-0" not in ours


async def test_the_metrics_port_serves_metrics_and_health_and_nothing_else() -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), metrics_port=0) as door:
        statuses = {}
        for path in ("/metrics", "/health/live", "/health/ready", "/admin/tenants", "/v1/models", "/"):
            async with door.http.get(f"{door.server.listeners.metrics_address}{path}") as response:
                statuses[path] = response.status

    assert statuses == {
        "/metrics": 200,
        "/health/live": 200,
        "/health/ready": 200,
        "/admin/tenants": 401,
        "/v1/models": 401,
        "/": 401,
    }
