"""The supervisor with real child processes: a small HTTP server that starts, serves, hangs and drains on demand."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from octavo_cli.local.process import Launch, ReplicaProcess
from octavo_cli.local.replica_set import Phase, ReplicaPolicy
from octavo_cli.local.supervisor import Supervisor

SERVER = textwrap.dedent(
    """
    import http.server, signal, sys, time
    def stop(*_):
        time.sleep(float(sys.argv[2])); sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
        def log_message(self, *a): pass
    print("listening", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """
)


class Fleet:
    def __init__(self, tmp_path: Path, argv: list[str], policy: ReplicaPolicy, desired: int) -> None:
        self.endpoints: list[str] = []
        self.supervisor = Supervisor(
            "test",
            lambda index: Launch(argv, {}, "/ready", "/live", tmp_path / f"{index}.log"),
            desired=desired,
            policy=policy,
            on_endpoints=lambda addresses: setattr(self, "endpoints", addresses),
        )
        self.task = asyncio.create_task(self.supervisor.run())

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.02)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def start(desired: int, *, drain_s: float = 0.0, argv: list[str] | None = None, **policy: float) -> Fleet:
        command = argv or [sys.executable, "-c", SERVER, "{port}", str(drain_s)]
        fleets.append(Fleet(tmp_path, command, ReplicaPolicy(**{"back_off_initial_s": 0.2, **policy}), desired))
        return fleets[-1]

    yield start
    for each in fleets:
        each.supervisor.kill()
        await asyncio.wait_for(each.task, 20)


async def test_the_wanted_number_becomes_ready_and_is_published(fleet: Callable[..., Fleet]) -> None:
    running = fleet(2)
    await running.until(lambda: len(running.endpoints) == 2)
    assert [m.replica.phase for m in running.supervisor.members] == [Phase.READY, Phase.READY]


async def test_a_killed_replica_leaves_the_endpoints_and_comes_back(fleet: Callable[..., Fleet]) -> None:
    running = fleet(2)
    await running.until(lambda: len(running.endpoints) == 2)
    victim = running.supervisor.members[0].process
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    await running.until(lambda: len(running.endpoints) == 1)
    await running.until(lambda: len(running.endpoints) == 2)
    assert running.supervisor.members[0].replica.restarts == 1
    assert "exit code -9" in running.supervisor.members[0].crash


async def test_scaling_down_drains_one_and_keeps_the_other(fleet: Callable[..., Fleet]) -> None:
    running = fleet(2, drain_s=0.5)
    await running.until(lambda: len(running.endpoints) == 2)
    running.supervisor.set_running(running.endpoints[0], 3)
    busy = running.endpoints[0]
    running.supervisor.set_replicas(1)
    await running.until(lambda: running.endpoints == [busy])
    assert Phase.DRAINING in {m.replica.phase for m in running.supervisor.members}
    await running.until(lambda: len(running.supervisor.members) == 1)


async def test_a_replica_that_hangs_is_killed_and_replaced(fleet: Callable[..., Fleet]) -> None:
    running = fleet(1, not_live_timeout_s=1.0, probe_timeout_s=0.5, probe_period_s=0.2)
    await running.until(lambda: len(running.endpoints) == 1)
    process = running.supervisor.members[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    await running.until(lambda: not running.endpoints)
    await running.until(lambda: len(running.endpoints) == 1)
    replacement = running.supervisor.members[0].process
    assert replacement is not None
    assert replacement.pid != process.pid


async def test_a_replica_that_cannot_start_backs_off_and_says_why(fleet: Callable[..., Fleet]) -> None:
    running = fleet(1, argv=[sys.executable, "-c", "raise SystemExit('the model file is missing')"])
    await running.until(lambda: any(m.replica.restarts >= 2 for m in running.supervisor.members))
    assert "the model file is missing" in running.supervisor.members[0].crash


async def test_stop_drains_everything_and_returns(fleet: Callable[..., Fleet]) -> None:
    running = fleet(2, drain_s=0.2)
    await running.until(lambda: len(running.endpoints) == 2)
    running.supervisor.stop()
    await asyncio.wait_for(running.task, 20)
    assert running.endpoints == []


async def test_a_drain_that_overruns_its_deadline_is_cut_short(fleet: Callable[..., Fleet]) -> None:
    running = fleet(1, drain_s=60.0, drain_timeout_s=0.5)
    await running.until(lambda: len(running.endpoints) == 1)
    running.supervisor.stop()
    await asyncio.wait_for(running.task, 20)


async def test_sockets_of_kv_events_are_the_users_own_and_go_with_the_replica(tmp_path: Path) -> None:
    show = "import sys; print(*sys.argv[1:], flush=True)"
    launch = Launch(
        [sys.executable, "-c", show, "{kv_events}", "{kv_replay}"], {}, "/", "/", tmp_path / "log", tells_kv_events=True
    )
    process = await ReplicaProcess.spawn(launch)
    told = process.cache_events
    assert told is not None
    folder = Path(told.events.removeprefix("ipc://")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert await process.wait() == 0
    assert process.log_tail()[-1].split() == [told.events, told.replay]
    assert not folder.exists()


async def test_sockets_are_gone_once_a_replica_was_killed_even_if_nobody_sees_its_end(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = await ReplicaProcess.spawn(Launch(sleep, {}, "/", "/", tmp_path / "log", tells_kv_events=True))
    assert process.cache_events is not None
    folder = Path(process.cache_events.events.removeprefix("ipc://")).parent
    assert folder.exists()

    process.kill()

    assert not folder.exists()
    assert await process.wait() == -signal.SIGKILL
