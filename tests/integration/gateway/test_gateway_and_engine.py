"""The gateway in front of a real engine: one trace over both, and no cache shared between tenants."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from fakes.gateway_door import open_door, until
from fakes.otlp_collector import Collector, attributes, otlp_collector
from octavo_gateway.inspection import inspect_body
from octavo_gateway.registry import CacheEvents, Endpoint, ModelEntry
from octavo_gateway.tenancy import KeyRecord, Tenant, TenantDirectory, hash_key, new_key

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "My secret is that the lighthouse keeper feeds a whale. "
QUESTION = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": SECRET * 12 + "Tell me a story about it."}],
    "temperature": 0,
    "max_tokens": 40,
    "ignore_eos": True,
}
KEYS = {name: new_key() for name in ("traced", "team-a", "team-b")}
DIRECTORY = TenantDirectory([Tenant(name, (KeyRecord("key", hash_key(key)),)) for name, key in KEYS.items()])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with otlp_collector() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    smollm2_gguf: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ModelEntry]:
    """`octavo serve` with SmolLM2-135M, as a model of a gateway."""
    sockets = tmp_path_factory.mktemp("kv")
    told = CacheEvents(f"ipc://{sockets}/events", f"ipc://{sockets}/replay")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "octavo_cli.main", "serve", str(smollm2_gguf), "--served-model-name", "smollm2"),
        *("--port", "0", "--device", "cpu", "--max-model-len", "1024", "--num-kv-blocks", "80"),
        *("--drain-propagation", "0", "--otlp-endpoint", collector.url),
        *("--kv-events-endpoint", told.events, "--kv-events-replay-endpoint", told.replay),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OTEL_BSP_SCHEDULE_DELAY": "200"},
    )
    assert process.stderr is not None
    lines: list[str] = []
    address = None
    while address is None:
        lines.append((await process.stderr.readline()).decode())
        assert lines[-1], "".join(lines)
        address = re.search(r"listening on (http://\S+)", lines[-1])

    async def follow(stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            lines.append(line.decode())

    following = asyncio.create_task(follow(process.stderr))
    async with asyncio.timeout(180), aiohttp.ClientSession() as http:
        while (await http.get(f"{address[1]}/health/ready")).status != 200:
            assert process.returncode is None, "".join(lines)
            await asyncio.sleep(0.2)
    yield ModelEntry("smollm2", (Endpoint("engine", address[1], cache_events=told),))
    process.terminate()
    assert await process.wait() == 0, "".join(lines)
    await following
    assert "lighthouse" not in "".join(lines)


def bearer(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


async def test_one_trace_covers_what_the_client_waits_for(engine: ModelEntry, collector: Collector) -> None:
    trace_id = os.urandom(16).hex()
    caller = f"00-{trace_id}-{os.urandom(8).hex()}-01"
    async with open_door(engine, otlp_endpoint=collector.url, directory=DIRECTORY) as door:
        await door.events(QUESTION, headers=bearer("traced"))  # connections and kernels are warm
        began = time.time_ns()
        await door.events(QUESTION, headers=bearer("traced") | {"traceparent": caller})
        ended = time.time_ns()

    def spans() -> list[Any]:
        return [span for span in collector.spans if span.trace_id.hex() == trace_id]

    await until(lambda: {"stream", "detokenize"} <= {span.name for span in spans()}, timeout_s=30)
    found = spans()
    parents = {span.parent_span_id for span in found}
    leaves = [span for span in found if span.span_id not in parents]
    covered = _union([(max(began, s.start_time_unix_nano), min(ended, s.end_time_unix_nano)) for s in leaves])
    by_name = {span.name: span for span in found}
    ids = {span.span_id for span in found}
    chat = attributes(by_name["chat smollm2"])

    assert {"octavo-gateway", "octavo"} <= collector.services
    assert {"admit", "prefill", "decode", "detokenize"} <= {span.name for span in leaves}
    assert sum(span.parent_span_id not in ids for span in found) == 1  # one tree, below the caller's span
    assert covered >= 0.95 * (ended - began)
    assert (chat["gen_ai.operation.name"], chat["gen_ai.usage.output_tokens"]) == ("chat", 40)
    assert b"lighthouse" not in collector.raw


def _union(intervals: list[tuple[int, int]]) -> int:
    total, reached = 0, 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


async def test_a_prompt_is_cached_for_its_tenant_alone(engine: ModelEntry) -> None:
    """A salt of the client's choice does not help: neither to look into another tenant's cache, nor in a header."""
    question = QUESTION | {"max_tokens": 1, "messages": [{"role": "user", "content": "Who owns this cache? " * 30}]}
    spoofed = bearer("team-b") | {"x-octavo-tenant": "team-a"}
    async with open_door(engine, directory=DIRECTORY) as door:

        async def cached(headers: dict[str, str], **fields: Any) -> int:
            async with door.post(question | fields, headers=headers) as response:
                usage = (await response.json())["usage"]
                count: int = usage["prompt_tokens_details"]["cached_tokens"]
                return count

        first = await cached(bearer("team-a"))
        again = await cached(bearer("team-a"))
        others = [await cached(spoofed), await cached(bearer("team-b"), cache_salt="team-a")]
        own = await cached(bearer("team-b"))

    assert first == 0
    assert again > 50
    assert others == [0, 0]
    assert own > 50


async def test_a_gateway_knows_what_the_engine_holds_whoever_asked_for_it(engine: ModelEntry) -> None:
    """Another gateway's requests, a restart of this one, and what the engine evicts: all of it by the engine's word."""

    def question(number: int) -> dict[str, Any]:
        text = f"Question {number}. " + f"What is the number {number * 37} good for? " * 24
        return QUESTION | {"max_tokens": 1, "messages": [{"role": "user", "content": text}]}

    def blocks(number: int) -> tuple[int, ...]:
        seen = inspect_body(json.dumps(question(number)).encode())
        return seen.prefix("smollm2", None, "team-a")

    async with open_door(engine, directory=DIRECTORY) as first:
        for number in range(2):
            await first.read(question(number), headers=bearer("team-a"))
    async with open_door(engine, directory=DIRECTORY) as second:  # which has sent nothing yet
        index = second.server.app.index
        await until(lambda: all(index.matched("engine", blocks(n)) == len(blocks(n)) for n in range(2)))
        assert len(blocks(0)) >= 3
        assert index.matched("engine", blocks(7)) == 0
        async with open_door(engine, directory=DIRECTORY) as other:
            await other.read(question(7), headers=bearer("team-a"))
            await until(lambda: index.matched("engine", blocks(7)) == len(blocks(7)))
            for number in range(8, 12):  # more than 80 blocks of 16 tokens hold
                await other.read(question(number), headers=bearer("team-a"))
        await until(lambda: index.matched("engine", blocks(0)) <= 1)
        async with second.post(question(0), headers=bearer("team-a")) as response:
            usage = (await response.json())["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] < 0.2 * usage["prompt_tokens"]
        await until(lambda: index.matched("engine", blocks(0)) == len(blocks(0)))
