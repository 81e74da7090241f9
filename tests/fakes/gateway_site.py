"""Replicas and a gateway in processes of their own, which a test may kill, and what each of them has counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
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

from fakes.replica_process import ReplicaProcess, free_port

COMMAND = [sys.executable, "-c", "from octavo_cli.main import main; main()", "gateway"]
Tokens = tuple[int, int, int]  # prompt, cached, output


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
        async with asyncio.timeout(60), aiohttp.ClientSession() as http:
            while True:
                assert self.gateway.poll() is None, f"the gateway ended with {self.gateway.returncode}"
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
