"""One engine replica as a child process: spawn, probe, read its start-up progress, drain, kill."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from octavo_gateway.registry import CacheEvents

LOG_TAIL_BYTES = 4_096
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """How to start a replica; `{host}`, `{port}`, `{kv_events}` and `{kv_replay}` in argv are filled in per start.

    `tells_kv_events`: it publishes them, at Unix sockets that only this user can reach.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    ready_path: str
    live_path: str
    log_path: Path
    tells_kv_events: bool = False


@dataclass(frozen=True)
class Probe:
    """One answer of a readiness probe; `detail` is the engine's own word on its start-up."""

    ready: bool
    live: bool
    detail: str = ""


class ReplicaProcess:
    """A running replica; `address` is where it listens. Created by `spawn`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        launch: Launch,
        port: int,
        sockets: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._process = process
        self._launch = launch
        self._sockets = sockets
        self.port = port
        self.address = f"http://127.0.0.1:{port}"

    @classmethod
    async def spawn(cls, launch: Launch) -> ReplicaProcess:
        """Start the child on a free port; it dies with this process, whatever happens to it."""
        port = free_port()
        sockets = tempfile.TemporaryDirectory(prefix="octavo-kv-") if launch.tells_kv_events else None
        filled = {"{port}": str(port), "{host}": "127.0.0.1"}
        if sockets is not None:
            told = _addresses(sockets)
            filled |= {"{kv_events}": told.events, "{kv_replay}": told.replay}
        argv = [_filled(word, filled) for word in launch.argv]
        launch.log_path.parent.mkdir(parents=True, exist_ok=True)
        with launch.log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *own_interpreter(argv),
                env={**os.environ, **launch.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which then drains
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        return cls(process, launch, port, sockets)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def cache_events(self) -> CacheEvents | None:
        """Where it tells what its prefix cache holds, if it does."""
        return None if self._sockets is None else _addresses(self._sockets)

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs."""
        code = self._process.returncode
        if code is not None:
            self._remove_sockets()
        return code

    async def probe(self, http: aiohttp.ClientSession, timeout_s: float) -> Probe:
        """Ask readiness first; liveness only matters when the replica is not ready."""
        ready, detail = await self._get(http, self._launch.ready_path, timeout_s)
        if ready:
            return Probe(ready=True, live=True)
        live, _ = await self._get(http, self._launch.live_path, timeout_s)
        return Probe(ready=False, live=live, detail=detail)

    async def _get(self, http: aiohttp.ClientSession, path: str, timeout_s: float) -> tuple[bool, str]:
        try:
            async with http.get(self.address + path, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
                body = await response.text()
                return response.status == 200, body[:1_000]
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False, ""

    def terminate(self) -> None:
        """SIGTERM: the replica stops taking work, finishes what it has and exits."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the replica and whatever it started; this process may end before it is seen to be gone."""
        self._signal(signal.SIGKILL)
        self._remove_sockets()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _remove_sockets(self) -> None:
        if self._sockets is not None:
            self._sockets.cleanup()

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        await self._process.wait()
        code = self.exit_code
        assert code is not None  # noqa: S101 - it has ended
        return code

    def log_tail(self) -> list[str]:
        """The last lines of the replica's log, for an error message."""
        return tail(self._launch.log_path)


def tail(path: Path) -> list[str]:
    """The last non-empty lines within the last 4 KiB of a file; empty if there is none."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(log.tell() - LOG_TAIL_BYTES, 0))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def _addresses(sockets: tempfile.TemporaryDirectory[str]) -> CacheEvents:
    return CacheEvents(f"ipc://{sockets.name}/events", f"ipc://{sockets.name}/replay")


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def own_interpreter(argv: Sequence[str]) -> list[str]:
    """The argv with the command `octavo` run by this very interpreter, whatever PATH says."""
    if argv and argv[0] == "octavo":
        return [sys.executable, "-m", "octavo_cli.main", *argv[1:]]
    return list(argv)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
