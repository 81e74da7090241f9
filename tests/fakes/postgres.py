"""A PostgreSQL of a test's own, in a folder of its own, that can be stopped and started again."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fakes.replica_process import free_port


def _program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


INITDB, PG_CTL = _program("initdb"), _program("pg_ctl")
AVAILABLE = INITDB is not None and PG_CTL is not None
WHY_NOT = "no PostgreSQL server programs (initdb, pg_ctl) on this machine: apt install postgresql"


class Postgres:
    """A server that is running after `start`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self._run(INITDB, "-D", folder / "data", "-U", "octavo", "--auth=trust", "--no-sync", "-E", "UTF8")

    @property
    def url(self) -> str:
        return f"postgresql://octavo:secret-word@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self._folder} -c fsync=off"
        self._run(PG_CTL, "-D", self._folder / "data", "-w", "-o", options, "-l", self._folder / "log", "start")

    def kill(self) -> None:
        """End it as a crash would."""
        self._run(PG_CTL, "-D", self._folder / "data", "-m", "immediate", "-w", "stop", check=False)

    def _run(self, *command: object, check: bool = True) -> None:
        """PostgreSQL refuses to run as root."""
        user = "postgres" if os.geteuid() == 0 else None
        subprocess.run(
            [str(part) for part in command], check=check, user=user, cwd=self._folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server."""
    with tempfile.TemporaryDirectory(prefix="octavo-pg-") as folder:
        if os.geteuid() == 0:
            entry = pwd.getpwnam("postgres")
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()
