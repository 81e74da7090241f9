"""The ledger holds exactly what the replicas counted, whoever leaves or dies: clients, replicas, gateways."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fakes.gateway_site import Site, Tokens, site

MESSAGES = [{"role": "user", "content": "Say something, please."}]


async def ask(running: Site, http: aiohttp.ClientSession, number: int, rng: random.Random) -> str:
    """One client: whole or streamed, with or without usage, to its end or leaving somewhere."""
    body: dict[str, Any] = {"model": "fake-model", "max_tokens": rng.randrange(1, 40)}
    path = "/v1/chat/completions" if rng.random() < 0.7 else "/v1/completions"
    body |= {"messages": MESSAGES} if path.startswith("/v1/chat") else {"prompt": "Once upon a time"}
    if rng.random() < 0.7:
        body |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.3}}
    leaves_after_s = None
    if rng.random() < 0.3:
        leaves_after_s = rng.random() * 0.2
        body |= {"max_tokens": 300, "ignore_eos": True}  # nearly a second

    async def whole() -> str:
        headers = {"x-request-id": f"r-{number}"}
        async with http.post(running.url + path, json=body, headers=headers) as response:
            text = await response.text()
            broken = response.status >= 500 or (body.get("stream") and not text.endswith("data: [DONE]\n\n"))
            return "failed" if broken else "ok"

    try:
        return await asyncio.wait_for(whole(), leaves_after_s)
    except TimeoutError:
        return "left"
    except aiohttp.ClientError:
        return "lost"


async def mixed(running: Site, total: int, concurrency: int, chaos: dict[int, str], seed: int) -> Counter[str]:
    """Send `total` requests; `chaos` says what happens when how many have ended."""
    rng = random.Random(seed)
    ended: Counter[str] = Counter()
    numbers = iter(range(total))
    to_come = sorted(chaos)
    up = asyncio.Event()
    up.set()

    async def client(http: aiohttp.ClientSession) -> None:
        for number in numbers:
            while to_come and number > to_come[0] + 2 * concurrency:  # every disaster meets requests under way
                await asyncio.sleep(0.01)
            await up.wait()
            ended[await ask(running, http, number, rng)] += 1

    async def disaster() -> None:
        for after, what in sorted(chaos.items()):
            while ended.total() < after:
                await asyncio.sleep(0.01)
            to_come.pop(0)
            if what == "replica":
                await running.replace_replica(rng.randrange(running.num_replicas))
            else:
                ending = asyncio.create_task(running.end_gateway(signal.SIGKILL if what == "kill" else signal.SIGTERM))
                await asyncio.sleep(0)
                up.clear()
                await ending
                await running.start_gateway()
                up.set()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(disaster(), *(client(http) for _ in range(concurrency)))
    async with asyncio.timeout(60):
        while running.num_open():  # what killed gateways left open is being settled
            await asyncio.sleep(0.2)
    assert await running.end_gateway(signal.SIGTERM) == 0
    assert running.num_open() == 0
    return ended


def check_equal(running: Site, deaths: int, concurrency: int) -> dict[str, tuple[Tokens, str, bool]]:
    """Each request that a replica has counted is in the ledger with exactly its counts; and so are the sums.

    Only what a replica had under way, or had just given up, when it was killed, may be an estimate and says so.
    """
    (counted, killed), ledger = running.counted_by_replicas(), running.ledger()
    untold = {name for name in counted if name in killed and ledger[name][2]}
    unfinished = {name for name, row in ledger.items() if name not in counted and row[0] != (0, 0, 0)}
    exact = set(counted) - untold
    wrong = {name: (counted[name], ledger.get(name)) for name in exact if ledger.get(name, ((),))[0] != counted[name]}
    assert not wrong
    sums = [sum(counted[name][i] for name in exact) for i in range(3)]
    assert sums == [sum(ledger[name][0][i] for name in exact) for i in range(3)]
    assert all(ledger[name][2] or ledger[name][1] == "ok" for name in unfinished)
    assert len(untold | unfinished) <= deaths * concurrency
    print(f"\n{len(exact)} requests exact, tokens {sums}; {len(untold | unfinished)} estimated")
    return ledger


async def test_the_ledger_equals_the_replicas_own_counts(tmp_path: Path) -> None:
    chaos = {60: "replica", 140: "kill", 220: "term"}
    async with site(tmp_path) as running:
        ended = await mixed(running, 300, 20, chaos, seed=1)
        ledger = check_equal(running, deaths=1, concurrency=20)
    outcomes = Counter(row[1] for row in ledger.values())

    assert ended["left"] > 60
    assert ended["ok"] > 100
    assert outcomes["cancelled"] > 40
    assert not any(row[2] for row in ledger.values() if row[1] == "ok")


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_the_ledger_equals_the_replicas_own_counts_after_ten_thousand_requests(tmp_path: Path) -> None:
    chaos = {400 + 900 * i: ("replica", "kill", "replica", "term")[i % 4] for i in range(11)}
    async with site(tmp_path, num_replicas=3) as running:
        ended = await mixed(running, 10_000, 50, chaos, seed=2)
        ledger = check_equal(running, deaths=6, concurrency=50)
    outcomes = Counter(row[1] for row in ledger.values())
    estimated = sum(row[2] for row in ledger.values())
    print(f"\nclients: {dict(ended)}; ledger: {dict(outcomes)}, {estimated} estimated")

    assert ended["left"] > 2_700
    assert outcomes["cancelled"] > 2_000
    assert outcomes["interrupted"] > 0
