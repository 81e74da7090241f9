"""The other ranks of this machine: processes of their own, watched, and gone when this one is."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from octavo_engine.config import EngineConfig

_LOST_WAIT_S = 2.0
_log = logging.getLogger(__name__)


class RankJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's process is told. rendezvous: a file all ranks of one machine share, or empty for the network."""

    config: EngineConfig
    rank: int
    ranks_here: int
    rendezvous: str
    parent_pid: int


class RankProcesses:
    """Starts ranks and notices the first that ends: none ends before this process does, unless something is wrong."""

    def __init__(self, config: EngineConfig, ranks: Sequence[int], ranks_here: int, rendezvous: str) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._some_lost = threading.Event()
        self._lost = ""
        self._stopping = False
        self._on_lost: Callable[[], None] | None = None
        for rank in ranks:
            job = RankJob(
                config=config, rank=rank, ranks_here=ranks_here, rendezvous=rendezvous, parent_pid=os.getpid()
            )
            self._processes[rank] = _start(job)
        for rank in ranks:
            threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank}-watch", daemon=True).start()

    @property
    def lost(self) -> str:
        """How the first lost rank ended, empty while all live."""
        return self._lost

    @property
    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self._processes.items()}

    def on_lost(self, call: Callable[[], None]) -> None:
        """Call this, on a thread of its own, when a rank ends."""
        self._on_lost = call

    def wait_for_loss(self, timeout_s: float | None = _LOST_WAIT_S) -> str:
        """`lost`, after giving a rank that is just ending the time to be seen."""
        self._some_lost.wait(timeout_s)
        return self._lost

    def stop(self) -> None:
        """End them: ranks hold nothing that must be saved."""
        self._stopping = True
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            process.wait()

    def _watch(self, rank: int) -> None:
        code = self._processes[rank].wait()
        if self._stopping or self._lost:
            return
        self._lost = f"rank {rank} {_describe_exit(code)}"
        _log.error("%s: its engine cannot go on", self._lost)
        self._some_lost.set()
        if self._on_lost is not None:
            self._on_lost()


def _start(job: RankJob) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.config.num_threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo_engine.parallel.follower"], stdin=subprocess.PIPE, env=environment
    )
    if process.stdin is not None:
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
    return process


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
