"""`octavo gateway --workers`: several processes behind one address that behave as one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fakes.gateway_door import HELLO
from fakes.openai_replica import OpenAIReplica
from fakes.redis_server import SERVER, WHY_NOT, redis_server
from fakes.replica_process import free_port
from octavo_gateway.tenancy import hash_key, new_key
from octavo_gateway.tenancy.keys import format_hash
from octavo_gateway.usage import read_usage

COMMAND = [sys.executable, "-c", "from octavo_cli.main import main; main()", "gateway"]
STREAM = HELLO | {"stream": True}
TENANT = """
apiVersion: serving.octavo.dev/v1alpha1
kind: InferenceTenant
metadata: {name: team-a}
spec: {keySecretRefs: [{name: keys}], limits: LIMITS}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {laptop: "HASH"}
"""


class Workers:
    """A gateway of several workers, as a child process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url
        self.lines: list[str] = []

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return [int(pid) for pid in children_of(self.process.pid)]

    async def post(self, body: Any, headers: Any = None) -> tuple[int, str]:
        """On a connection of its own, so that any worker may get it."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
            http.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as response,
        ):
            return response.status, await response.text()

    async def get(self, path: str) -> str:
        async with aiohttp.ClientSession() as http, http.get(self.url + path) as response:
            return await response.text()

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def ended(pids: list[int]) -> None:
    async with asyncio.timeout(30):
        while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):  # noqa: ASYNC240
            await asyncio.sleep(0.05)


def kept(pids: list[int]) -> list[str]:
    """The metrics that these workers keep for the day they are gone."""
    folders = Path(tempfile.gettempdir()).glob("octavo-gateway-*")
    files = [folder / f"worker-{pid}.metrics" for folder in folders for pid in pids]
    return [file.read_text() for file in files if file.is_file()]


def write(path: Path, text: str) -> None:
    path.write_text(text)


@contextlib.asynccontextmanager
async def workers(
    folder: Path, replica: OpenAIReplica, *flags: str, count: int = 3, environment: dict[str, str] | None = None
) -> AsyncIterator[Workers]:
    config = {"models": [{"name": "m", "endpoints": [{"url": replica.url}]}]}
    write(folder / "gateway.yaml", json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config", str(folder / "gateway.yaml"), "--port", "0", "--workers", str(count), *flags,
        stderr=asyncio.subprocess.PIPE, env=os.environ | (environment or {}),
    )  # fmt: skip
    assert process.stderr is not None
    running = Workers(process, "")
    reading: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(60):
            while not running.url:
                line = (await process.stderr.readline()).decode()
                assert line, "".join(running.lines)
                running.lines.append(line)
                found = re.search(r"listens at (http\S+) with \d workers", line)
                running.url = found[1] if found else ""

        async def read_on() -> None:
            assert process.stderr is not None
            while line := await process.stderr.readline():
                running.lines.append(line.decode())

        reading = asyncio.create_task(read_on())
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if reading is not None:
            await reading


def total(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE))


async def test_workers_share_the_work_and_speak_with_one_voice(tmp_path: Path) -> None:
    replica = OpenAIReplica("r", tokens=300, token_delay=0.02)
    async with replica.serve(), workers(tmp_path, replica, "--ledger", str(tmp_path / "ledger")) as gateway:
        held = [asyncio.ensure_future(gateway.post(STREAM)) for _ in range(8)]
        while replica.running < 8:
            await asyncio.sleep(0.02)
        flying = [total(await gateway.get("/metrics"), "octavo_gateway_requests_in_flight") for _ in range(6)]
        states = [json.loads(await gateway.get("/api/state"))["models"][0]["in_flight"] for _ in range(6)]
        replica.token_delay = 0.0
        answers = await asyncio.gather(*held, *(gateway.post(HELLO) for _ in range(30)))
        page = await gateway.get("/metrics")
        code = await gateway.stop()

    assert code == 0
    assert [status for status, _ in answers] == [200] * 38
    assert flying == [8] * 6
    assert states == [8] * 6
    assert total(page, "octavo_gateway_requests_total") == 38
    assert total(page, "octavo_gateway_arrivals_total") == 38
    assert total(page, "octavo_gateway_endpoints") == 1  # the same one seen by all
    (row,) = read_usage(tmp_path / "ledger" / "usage.sqlite")
    assert (row.requests, row.output_tokens) == (38, 38 * 300)


async def test_a_worker_that_dies_is_replaced_and_its_counts_are_not_forgotten(tmp_path: Path) -> None:
    async with OpenAIReplica("r").serve() as replica, workers(tmp_path, replica) as gateway:
        before = gateway.pids
        answers = [await gateway.post(HELLO) for _ in range(30)]
        while sum(total(page, "octavo_gateway_requests_total") for page in kept(before)) < 30:
            await asyncio.sleep(0.1)
        for pid in before[:2]:
            os.kill(pid, signal.SIGKILL)
        while len(gateway.pids) < 3 or set(before[:2]) & set(gateway.pids):
            await asyncio.sleep(0.05)
        answers += [await gateway.post(HELLO) for _ in range(30)]
        page = await gateway.get("/metrics")
        code = await gateway.stop()

    assert [status for status, _ in answers] == [200] * 60
    assert total(page, "octavo_gateway_requests_total") == 60
    assert code == 0


@pytest.mark.slow
async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with OpenAIReplica("r").serve() as replica, workers(tmp_path, replica, count=2) as gateway:
        victim, other = gateway.pids
        while not kept([victim]):
            await asyncio.sleep(0.1)
        os.kill(victim, signal.SIGSTOP)
        async with asyncio.timeout(120):
            while victim in gateway.pids or len(gateway.pids) < 2:
                await asyncio.sleep(0.2)
        answers = [await gateway.post(HELLO) for _ in range(20)]
        assert other in gateway.pids
        assert await gateway.stop() == 0

    assert [status for status, _ in answers] == [200] * 20


async def test_sigterm_finishes_the_streams_of_every_worker(tmp_path: Path) -> None:
    replica = OpenAIReplica("r", tokens=40, token_delay=0.05)
    async with replica.serve(), workers(tmp_path, replica) as gateway:
        streams = [asyncio.ensure_future(gateway.post(STREAM)) for _ in range(12)]
        while replica.running < 12:
            await asyncio.sleep(0.02)
        code = await gateway.stop()
        answers = await asyncio.gather(*streams)

    assert code == 0
    assert all(text.endswith("data: [DONE]\n\n") for _, text in answers)


async def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    async with OpenAIReplica("r").serve() as replica, workers(tmp_path, replica) as gateway:
        orphans = gateway.pids
        gateway.process.kill()
        await gateway.process.wait()
        await ended(orphans)


async def test_a_killed_gateway_is_replaced_at_its_address_while_its_workers_finish_their_streams(
    tmp_path: Path,
) -> None:
    replica = OpenAIReplica("r", tokens=100, token_delay=0.2)
    flags = ["--ledger", str(tmp_path / "ledger"), "--admin-port", "0", "--metrics-port", str(free_port())]
    secret = {"OCTAVO_GATEWAY_ADMIN_TOKEN": "x" * 32}
    async with replica.serve(), workers(tmp_path, replica, *flags, environment=secret) as killed:
        port, orphans = killed.url.rpartition(":")[2], killed.pids
        streams = [asyncio.ensure_future(killed.post(STREAM)) for _ in range(9)]
        while replica.running < 9:
            await asyncio.sleep(0.02)
        killed.process.kill()
        while killed.process.returncode is None:  # `wait` waits for the pipe that its workers hold, too
            await asyncio.sleep(0.02)
        async with workers(tmp_path, replica, *flags, "--port", port, environment=secret) as successor:
            assert not any(stream.done() for stream in streams)
            replica.token_delay = 0.0
            answers = [await successor.post(HELLO) for _ in range(9)]
            answers += await asyncio.gather(*streams)
            await ended(orphans)
            assert await successor.stop() == 0

    assert [status for status, _ in answers] == [200] * 18
    assert all(text.endswith("data: [DONE]\n\n") for _, text in answers[9:])
    (row,) = read_usage(tmp_path / "ledger" / "usage.sqlite")
    assert (row.requests, row.output_tokens) == (18, 18 * 100)


async def test_without_redis_each_worker_gives_out_its_part_and_a_revoked_key_is_refused_by_all(
    tmp_path: Path,
) -> None:
    key = new_key()
    tenants = tmp_path / "tenants.yaml"
    text = TENANT.replace("HASH", format_hash(hash_key(key))).replace("LIMITS", "{requestsPerMinute: 30}")
    write(tenants, text)
    bearer = {"authorization": f"Bearer {key}"}
    async with OpenAIReplica("r").serve() as replica, workers(tmp_path, replica, "--tenants", str(tenants)) as gateway:
        statuses = [status for status, _ in await asyncio.gather(*(gateway.post(HELLO, bearer) for _ in range(90)))]
        write(tenants, TENANT.replace("HASH", format_hash(hash_key("x"))).replace("LIMITS", "{}"))
        async with asyncio.timeout(60):
            while {status for status, _ in await asyncio.gather(*(gateway.post(HELLO, bearer) for _ in range(12)))} != {
                401
            }:
                await asyncio.sleep(0.1)

    assert 10 <= statuses.count(200) <= 33  # thirty, and what refills meanwhile
    assert statuses.count(200) + statuses.count(429) == 90


@pytest.mark.skipif(SERVER is None, reason=WHY_NOT)
async def test_through_redis_the_workers_together_give_out_exactly_the_limit(tmp_path: Path) -> None:
    key = new_key()
    tenants = tmp_path / "tenants.yaml"
    write(tenants, TENANT.replace("HASH", format_hash(hash_key(key))).replace("LIMITS", "{maxConcurrentRequests: 5}"))
    bearer = {"authorization": f"Bearer {key}"}
    replica = OpenAIReplica("r", tokens=1_000, token_delay=0.05)
    with redis_server() as port:
        flags = ["--tenants", str(tenants), "--redis-url", f"redis://127.0.0.1:{port}/0"]
        async with replica.serve(), workers(tmp_path, replica, *flags) as gateway:
            asking = [asyncio.ensure_future(gateway.post(STREAM, bearer)) for _ in range(40)]
            while sum(task.done() for task in asking) < 35:
                await asyncio.sleep(0.05)
            refused = [task.result()[0] for task in asking if task.done()]
            running = replica.running
            for task in asking:
                task.cancel()

    assert refused == [429] * 35
    assert running == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "0"], "between 1 and 256"),
        (["--host", "192.0.2.1"], "choose another port"),
        (["--tenants", "/nowhere"], "no file or folder at /nowhere"),
    ],
)
async def test_what_is_wrong_at_the_start_ends_all_with_a_message(tmp_path: Path, flags: list[str], words: str) -> None:
    write(tmp_path / "gateway.yaml", "models: []")
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config", str(tmp_path / "gateway.yaml"), "--port", "0", "--workers", "2", *flags,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await asyncio.wait_for(process.communicate(), 60)

    assert process.returncode == 2
    assert words in stderr.decode()
    assert "Traceback" not in stderr.decode()
