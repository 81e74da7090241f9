"""Keeps the wanted number of replica processes of one workload serving; the IO around `replica_set`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import aiohttp

from octavo_cli.local.process import Launch, ReplicaProcess
from octavo_cli.local.replica_set import (
    Drain,
    Forget,
    Kill,
    Phase,
    Replica,
    ReplicaPolicy,
    Start,
    after_exit,
    next_actions,
)

log = logging.getLogger(__name__)

TICK_S = 0.25
KILL_WAIT_S = 10.0


@dataclass
class Member:
    """A replica with its process (None while it waits for its restart) and its latest news."""

    replica: Replica
    process: ReplicaProcess | None = None
    detail: str = ""
    crash: str = ""  # why the previous process ended, for the table and for errors
    probe_at: float = 0.0
    exited: asyncio.Task[int] | None = field(default=None, repr=False)
    probing: asyncio.Task[None] | None = field(default=None, repr=False)


class Supervisor:
    """Runs one workload. `on_endpoints` hears the addresses that may receive requests whenever they change."""

    def __init__(
        self,
        name: str,
        launch: Callable[[int], Launch],
        *,
        desired: int,
        policy: ReplicaPolicy,
        on_endpoints: Callable[[list[str]], None],
    ) -> None:
        self.name = name
        self.desired = desired
        self._launch = launch
        self._policy = policy
        self._on_endpoints = on_endpoints
        self._members: dict[int, Member] = {}
        self._published: list[str] = []
        self._stopping = False
        self._wake = asyncio.Event()

    @property
    def members(self) -> list[Member]:
        """Replicas in index order."""
        return [self._members[index] for index in sorted(self._members)]

    def set_replicas(self, count: int) -> None:
        """Change the wanted number; taken up at once."""
        self.desired = count
        self._wake.set()

    def set_running(self, address: str, running: int) -> None:
        """Note how many requests a replica has, so that scaling down stops the idlest."""
        for member in self._members.values():
            if member.process is not None and member.process.address == address:
                member.replica = replace(member.replica, running=running)

    async def run(self) -> None:
        """Supervise until `stop` was called and the last process is gone."""
        async with aiohttp.ClientSession() as http:
            try:
                while not (self._stopping and not self._members):
                    self._observe(http)
                    for action in next_actions(self._replicas(), self.desired, time.monotonic(), self._policy):
                        await self._carry_out(action)
                    self._publish()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), TICK_S)
                    self._wake.clear()
            finally:
                await self._kill_all()

    def stop(self) -> None:
        """Drain every replica; `run` returns when the last one is gone."""
        self._stopping = True
        self.set_replicas(0)

    def kill(self) -> None:
        """End every process at once, without draining."""
        self.stop()
        for member in self._members.values():
            if member.process is not None:
                member.process.kill()
        self._wake.set()

    def _replicas(self) -> list[Replica]:
        return [member.replica for member in self.members]

    def _observe(self, http: aiohttp.ClientSession) -> None:
        """Note ended processes and begin the probes that are due; a slow answer holds nobody else up."""
        now = time.monotonic()
        for member in self.members:
            process = member.process
            if process is None:
                continue
            if process.exit_code is not None:
                self._note_exit(member, process)
            elif now >= member.probe_at and (member.probing is None or member.probing.done()):
                ready = member.replica.phase is Phase.READY
                member.probe_at = now + (self._policy.probe_period_s if ready else TICK_S)
                member.probing = asyncio.create_task(self._probe(member, process, http))

    async def _probe(self, member: Member, process: ReplicaProcess, http: aiohttp.ClientSession) -> None:
        probe = await process.probe(http, self._policy.probe_timeout_s)
        if process.exit_code is not None or member.process is not process or member.replica.phase is Phase.DRAINING:
            return  # its end is noted by the loop; a draining replica answers to nobody's probe
        member.detail = "" if probe.ready else _progress_text(probe.detail)
        before = member.replica.phase
        member.replica = _after_probe(member.replica, probe.ready, probe.live, time.monotonic())
        if member.replica.phase is not before:
            self._wake.set()

    def _note_exit(self, member: Member, process: ReplicaProcess) -> None:
        after = after_exit(member.replica, time.monotonic(), self._policy)
        if after is None:
            del self._members[member.replica.index]
            return
        tail = process.log_tail()
        member.crash = f"exit code {process.exit_code}" + (f": {tail[-1].strip()}" if tail else "")
        log.warning(
            "%s replica %d ended with %s; restart %d in %.0f s",
            self.name,
            member.replica.index,
            member.crash,
            after.restarts,
            after.restart_at - after.since,
        )
        member.replica, member.process = after, None

    async def _carry_out(self, action: Start | Drain | Kill | Forget) -> None:
        if isinstance(action, Start):
            await self._start(action)
            return
        member = self._members[action.index]
        if isinstance(action, Forget) or member.process is None:
            del self._members[action.index]
        elif isinstance(action, Drain):
            member.replica = replace(member.replica, phase=Phase.DRAINING, since=time.monotonic())
            member.detail = ""
            self._publish()  # no new request is sent to a replica that has been told to stop
            member.process.terminate()
        else:
            log.warning("%s replica %d is killed: it %s", self.name, action.index, action.reason)
            member.process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.process.wait(), KILL_WAIT_S)

    async def _start(self, action: Start) -> None:
        previous = self._members.get(action.index)
        process = await ReplicaProcess.spawn(self._launch(action.index))
        self._members[action.index] = Member(
            Replica(index=action.index, phase=Phase.STARTING, since=time.monotonic(), restarts=action.restarts),
            process,
            crash=previous.crash if previous else "",
        )
        # Reaping wakes the loop, so a crash is seen at once and not at the next tick.
        exited = asyncio.create_task(process.wait())
        exited.add_done_callback(lambda _: self._wake.set())
        self._members[action.index].exited = exited

    def _publish(self) -> None:
        ready = [m.process.address for m in self.members if m.process and m.replica.phase is Phase.READY]
        if ready != self._published:
            self._published = ready
            self._on_endpoints(ready)

    async def _kill_all(self) -> None:
        for member in self.members:
            if member.probing is not None:
                member.probing.cancel()
            if member.process is not None and member.process.exit_code is None:
                member.process.kill()
                await member.process.wait()
        self._members.clear()
        self._publish()


def _after_probe(replica: Replica, ready: bool, live: bool, now: float) -> Replica:
    """The replica after one probe answer. A starting replica is not blamed for not being live yet."""
    if ready:
        since = replica.since if replica.phase is Phase.READY else now
        return replace(replica, phase=Phase.READY, since=since, not_live_since=None)
    if replica.phase is Phase.STARTING:
        return replica
    since = replica.since if replica.phase is Phase.UNREADY else now
    not_live_since = None if live else (replica.not_live_since or now)
    return replace(replica, phase=Phase.UNREADY, since=since, not_live_since=not_live_since)


def _progress_text(body: str) -> str:
    """`{"phase": "weights", "fraction": 0.4}` of a starting engine as `weights 40%`."""
    try:
        news = json.loads(body)
        progress = news.get("progress") or news
        return f"{progress['phase']} {float(progress['fraction']):.0%}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
