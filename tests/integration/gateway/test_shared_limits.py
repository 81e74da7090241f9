"""Limits shared by several gateways through a real Redis; skipped where there is no redis-server."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fakes.gateway_door import HELLO, Door, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from fakes.redis_server import SERVER, WHY_NOT, redis_server
from octavo_gateway.tenancy import KeyRecord, Limits, Tenant, TenantDirectory, hash_key, new_key

KEY = new_key()
BEARER = {"authorization": f"Bearer {KEY}"}

pytestmark = pytest.mark.skipif(SERVER is None, reason=WHY_NOT)


@contextlib.asynccontextmanager
async def two_doors(port: int, replica: OpenAIReplica, **limits: Any) -> AsyncIterator[tuple[Door, Door]]:
    """Two gateways that share one Redis, with one tenant."""
    tenant = Tenant("t", (KeyRecord("k", hash_key(KEY)),), limits=Limits(**limits))
    common: dict[str, Any] = {"directory": TenantDirectory([tenant]), "redis_url": f"redis://127.0.0.1:{port}/0"}
    async with open_door(entry(replica), **common) as one, open_door(entry(replica), **common) as two:
        yield one, two


async def statuses(doors: tuple[Door, Door], count: int) -> list[int]:
    """Status of requests sent at once to both gateways in turn."""
    answers = await asyncio.gather(*(doors[i % 2].read(HELLO, headers=BEARER) for i in range(count)))
    return [status for status, _, _ in answers]


async def test_two_gateways_together_allow_what_one_limit_says() -> None:
    with redis_server() as port:
        async with OpenAIReplica().serve() as replica, two_doors(port, replica, requests_per_minute=10) as doors:
            found = await statuses(doors, 30)

    assert found.count(200) == 10
    assert found.count(429) == 20


async def test_what_was_reserved_too_much_is_given_back_to_all() -> None:
    """Each request reserves 256 tokens of output and uses five: 12 or so times seven and five fit into 300."""
    with redis_server() as port:
        async with OpenAIReplica().serve() as replica, two_doors(port, replica, tokens_per_minute=300) as doors:
            found = []
            for number in range(8):
                status, _, _ = await doors[number % 2].read(HELLO, headers=BEARER)
                shared = doors[number % 2].server.app.accounts.shared
                assert shared is not None
                await until(lambda shared=shared: not shared._settling)
                found.append(status)

    assert found[:3] == [200, 200, 200]


async def test_concurrency_is_counted_over_both_and_freed_when_a_client_leaves() -> None:
    replica = OpenAIReplica(tokens=1_000, token_delay=0.05)
    with redis_server() as port:
        async with replica.serve(), two_doors(port, replica, max_concurrent_requests=1) as doors:
            running = asyncio.ensure_future(doors[0].events(HELLO, headers=BEARER))
            await until(lambda: replica.running == 1)
            refused, text, _ = await doors[1].read(HELLO, headers=BEARER)
            running.cancel()
            await until(lambda: doors[0].server.app.in_flight == 0)
            shared = doors[0].server.app.accounts.shared
            assert shared is not None
            await until(lambda: not shared._settling)
            replica.tokens = 1
            accepted, _, _ = await doors[1].read(HELLO, headers=BEARER)

    assert (refused, accepted) == (429, 200)
    assert "concurrent" in text


async def test_a_monthly_budget_is_used_up_by_all_together() -> None:
    with redis_server() as port:
        async with OpenAIReplica(tokens=5).serve() as replica, two_doors(port, replica, tokens_per_month=30) as doors:
            found = []
            for number in range(6):
                found.append((await doors[number % 2].read(HELLO, headers=BEARER))[0])
                shared = doors[number % 2].server.app.accounts.shared
                assert shared is not None
                await until(lambda shared=shared: not shared._settling)

    assert found == [200, 200, 200, 429, 429, 429]  # twelve tokens each


async def test_without_redis_each_gateway_still_holds_the_limit_and_says_so() -> None:
    with contextlib.ExitStack() as redis:
        port = redis.enter_context(redis_server())
        async with OpenAIReplica().serve() as replica, two_doors(port, replica, requests_per_minute=4) as doors:
            shared = await statuses(doors, 2)
            redis.close()  # killed
            alone = [await doors[0].read(HELLO, headers=BEARER) for _ in range(5)]
            page = doors[0].server.app.metrics.page().decode()

    assert shared == [200, 200]
    assert [status for status, _, _ in alone] == [200, 200, 200, 429, 429]  # one of four was used before
    failures = re.search(r"shared_limit_failures_total (\d+)", page)
    assert failures is not None
    assert int(failures[1]) >= 3
