"""A fake replica as a child process, for clients that must not share a process with the server."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class ReplicaProcess:
    """One process; `start` returns when it is ready."""

    def __init__(self, engine: dict[str, Any] | None = None, **settings: Any) -> None:
        self._arguments = [
            json.dumps(engine or {}),
            json.dumps({"port": 0, "served_model_names": ["fake-model"], **settings}),
        ]
        self.lines: list[str] = []
        self.url = ""

    def start(self) -> None:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "fakes.fake_replica", *self._arguments], cwd=TESTS, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        while not self.url:
            self.lines.append(process.stderr.readline())
            assert self.lines[-1], "".join(self.lines)
            found = re.search(r"listening on (http://\S+)", self.lines[-1])
            self.url = found[1] if found else ""
        self._reader = threading.Thread(target=lambda: self.lines.extend(process.stderr or ()), daemon=True)
        self._reader.start()
        while not _is_ready(self.url):
            assert process.poll() is None, "".join(self.lines)
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; returns when all it wrote was read."""
        self._process.kill()
        self._process.wait()
        self._reader.join()


@contextlib.contextmanager
def replica_process(engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[str]:
    """Yield the HTTP address once it is ready."""
    process = ReplicaProcess(engine, **settings)
    process.start()
    try:
        yield process.url
        assert "Traceback" not in "".join(process.lines)
        assert "failed with" not in "".join(process.lines), "".join(process.lines)
    finally:
        process.kill()


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready") as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False
