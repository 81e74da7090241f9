"""Private folders of an engine, for sockets and for ranks to meet: removed even when their owner was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "octavo-engine-"


class PrivateFolder:
    """A new folder of mode 0700. Its lock, which the kernel drops with the process, tells others that it is in use."""

    def __init__(self) -> None:
        self.path, self._lock = _create()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned() -> list[str]:
    """Delete the folders of this user that no living process holds, and name them."""
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, in use, somebody else's, or no folder
            lock = _locked(str(path))
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(path)
                    removed.append(str(path))
            finally:
                os.close(lock)
    return removed


def _create() -> tuple[str, int | None]:
    """The folder and its lock; None where the file system has no locks, so that nobody can take it for abandoned."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        try:
            lock = _locked(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process's look at it came in between
        except OSError:
            return path, None
        if Path(path).is_dir():
            return path, lock
        os.close(lock)


def _locked(path: str) -> int:
    """A descriptor that holds the folder's lock; raises `OSError`, `BlockingIOError` if somebody else has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
