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


@contextlib.contextmanager
def replica_process(engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[str]:
    """Yield the HTTP address once it is ready."""
    arguments = [json.dumps(engine or {}), json.dumps({"port": 0, "served_model_names": ["fake-model"], **settings})]
    process = subprocess.Popen(
        [sys.executable, "-m", "fakes.fake_replica", *arguments], cwd=TESTS, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        url = None
        while url is None:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
            found = re.search(r"listening on (http://\S+)", lines[-1])
            url = found[1] if found else None
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        while not _is_ready(url):
            assert process.poll() is None, "".join(lines)
            time.sleep(0.05)
        yield url
        assert "Traceback" not in "".join(lines)
        assert "failed with" not in "".join(lines), "".join(lines)
    finally:
        process.kill()
        process.wait()


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
