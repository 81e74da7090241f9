"""A Redis (or Valkey) of a test's own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

from fakes.replica_process import free_port

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
WHY_NOT = "no redis-server or valkey-server on this machine"


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """A Redis of the test's own; yields its port."""
    assert SERVER is not None
    port = free_port()
    command = [SERVER, "--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()
