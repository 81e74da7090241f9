"""The ledger holds exactly what the replicas counted, whoever leaves or dies: clients, replicas, gateways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fakes.replica_process import ReplicaProcess, free_port

COMMAND = [sys.executable, "-c", "from octavo_cli.main import main; main()", "gateway"]
Tokens = tuple[int, int, int]  # prompt, cached, output
MESSAGES = [{"role": "user", "content": "Say something, please."}]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@dataclass
class Site:
    """Replicas and a gateway in processes of their own, at addresses that stay."""

    folder: Path
    num_replicas: int
    flags: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    replicas: list[ReplicaProcess] = field(default_factory=list)
    past: list[ReplicaProcess] = field(default_factory=list)
    gateway: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _replica(self, port: int) -> ReplicaProcess:
        return ReplicaProcess({"step_s": 0.003}, port=port)

    async def start(self) -> None:
        self.replicas = [self._replica(free_port()) for _ in range(self.num_replicas)]
        for replica in self.replicas:
            await asyncio.to_thread(replica.start)
        endpoints = [{"url": replica.url} for replica in self.replicas]
        models = [{"name": "fake-model", "readyPath": "/health/ready", "endpoints": endpoints}]
        write_json(self.folder / "gateway.yaml", {"models": models})
        await self.start_gateway()

    async def start_gateway(self) -> None:
        flags = ["--config", str(self.folder / "gateway.yaml"), "--ledger", str(self.folder / "ledger")]
        self.gateway = subprocess.Popen(  # noqa: ASYNC220
            [*COMMAND, *flags, "--port", str(self.port), "--no-access-log", *self.flags],
            stderr=subprocess.DEVNULL,
        )
        async with aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"{self.url}/v1/models") as response:
                        if (await response.json()).get("data"):
                            return
                await asyncio.sleep(0.05)

    async def end_gateway(self, number: signal.Signals) -> int:
        assert self.gateway is not None
        self.gateway.send_signal(number)
        return await asyncio.to_thread(self.gateway.wait)

    async def replace_replica(self, index: int) -> None:
        """SIGKILL, and a new process at the same address."""
        old = self.replicas[index]
        await asyncio.to_thread(old.kill)
        self.past.append(old)
        self.replicas[index] = fresh = self._replica(int(old.url.rpartition(":")[2]))
        await asyncio.to_thread(fresh.start)

    def counted_by_replicas(self) -> tuple[dict[str, Tokens], set[str]]:
        """What the replicas' own logs say of each request, by its id; and those that a killed one had a part in."""
        found: dict[str, Tokens] = {}
        killed: set[str] = set()
        for replica in (*self.past, *self.replicas):
            for line in replica.lines:
                match = re.search(r"request (\{.*\})", line)
                if match is None:
                    continue
                fields = json.loads(match[1])
                names = ("prompt_tokens", "cached_tokens", "completion_tokens")
                prompt, cached, output = (fields.get(name, 0) for name in names)
                before = found.get(fields["request_id"], (0, 0, 0))
                if output:
                    found[fields["request_id"]] = (before[0] + prompt, before[1] + cached, before[2] + output)
                    if replica in self.past:
                        killed.add(fields["request_id"])
        return found, killed

    def num_open(self) -> int:
        """Requests that the ledger knows to have begun and not how they ended."""
        with contextlib.closing(sqlite3.connect(self.folder / "ledger" / "usage.sqlite")) as database:
            (count,) = database.execute("SELECT count(*) FROM open_requests").fetchone()
            return int(count)

    def ledger(self) -> dict[str, tuple[Tokens, str, bool]]:
        """Tokens, outcome and whether they are estimated, by the client's id of each request."""
        with contextlib.closing(sqlite3.connect(self.folder / "ledger" / "usage.sqlite")) as database:
            rows = database.execute(
                "SELECT request_id, prompt_tokens, cached_tokens, output_tokens, outcome, estimated FROM usage"
            ).fetchall()
        assert max(Counter(row[0] for row in rows).values()) == 1, "a request is in the ledger twice"
        return {row[0]: ((row[1], row[2], row[3]), row[4], bool(row[5])) for row in rows}


@contextlib.asynccontextmanager
async def site(folder: Path, num_replicas: int = 2, flags: tuple[str, ...] = ()) -> AsyncIterator[Site]:
    running = Site(folder, num_replicas, flags)
    try:
        await running.start()
        yield running
    finally:
        if running.gateway is not None:
            running.gateway.kill()
            running.gateway.wait()
        for replica in running.replicas:
            replica.kill()


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
