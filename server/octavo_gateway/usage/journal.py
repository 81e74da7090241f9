"""The journal under the ledger: lines that outlive the process, in segments that are dropped once a database has them.

Bounded: while the database is away segments pile up, and at the bound new requests are refused rather than lost.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from pathlib import Path

from octavo_gateway.usage.store import LedgerError

SEGMENT_BYTES = 16 * 1024 * 1024
"""A segment that grows beyond this (because the database is away) is followed by another."""


LEAVING = b"leaving"


class JournalInUseError(LedgerError):
    """The folder belongs to another process, which is about to end if `leaving`."""

    def __init__(self, folder: Path, leaving: bool) -> None:
        super().__init__(f"usage ledger {folder}: another gateway uses this folder; give each its own")
        self.leaving = leaving


class Journal:
    """One folder, one process. `write` may be called from any thread; all else from one at a time."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock_file = _acquire(folder)
        self._mutex = threading.Lock()  # guards the current segment
        self.source = _source(folder)
        self._left_behind = self._segments()
        self._bytes = sum(segment.stat().st_size for segment in self._left_behind)
        self._number = _number(self._left_behind[-1]) if self._left_behind else 0
        self._full = list(self._left_behind)
        self._open_segment()

    @property
    def num_bytes(self) -> int:
        """What waits to be taken into the database."""
        return self._bytes

    @property
    def is_full(self) -> bool:
        """True when no new request should begin."""
        return self._bytes >= self._max_bytes

    @property
    def full_segments(self) -> list[Path]:
        """Segments that nothing more is written to, oldest first."""
        with self._mutex:
            return list(self._full)

    def is_left_behind(self, segment: Path) -> bool:
        """True for a segment of an earlier process."""
        return segment in self._left_behind

    def write(self, line: bytes) -> None:
        """Append a line; it is safe from the end of this process once this returns. Raises `OSError`."""
        with self._mutex:
            if self._segment_bytes >= SEGMENT_BYTES:
                self._rotate()
            written = os.write(self._segment, line + b"\n")
            self._bytes += written
            self._segment_bytes += written
            if written <= len(line):
                self._rotate()  # what follows a torn line begins a segment of its own
                raise OSError(f"usage journal {self._folder}: only a part of a line could be written")

    def rotate(self) -> None:
        """Make what was written so far a full segment."""
        with self._mutex:
            if self._segment_bytes:
                self._rotate()

    def drop(self, segment: Path) -> None:
        """Forget a full segment: the database has it."""
        size = segment.stat().st_size
        segment.unlink()
        with self._mutex:
            self._full.remove(segment)
            self._bytes -= size

    def say_leaving(self) -> None:
        """For whoever wants the folder from now on."""
        os.write(self._lock_file, LEAVING)

    def close(self) -> None:
        """Let go of the folder; what was not dropped is there for the next process."""
        os.close(self._segment)
        if not self._segment_bytes:
            self._path.unlink()
        os.close(self._lock_file)

    def _rotate(self) -> None:
        os.close(self._segment)
        self._full.append(self._path)
        self._open_segment()

    def _open_segment(self) -> None:
        self._number += 1
        self._segment_bytes = 0
        self._path = self._folder / f"journal-{self._number:012d}.jsonl"
        self._segment = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob("journal-*.jsonl"), key=_number)


def _number(segment: Path) -> int:
    return int(segment.stem.split("-")[1])


def _acquire(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise LedgerError(f"usage ledger {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        leaving = os.read(lock, len(LEAVING)) == LEAVING
        os.close(lock)
        raise JournalInUseError(folder, leaving) from None
    os.ftruncate(lock, 0)
    return lock


def _source(folder: Path) -> str:
    """The name under which a database knows this folder, the same at every start."""
    path = folder / "source"
    if path.is_file():
        return path.read_text(encoding="ascii").strip()
    source = uuid.uuid4().hex
    path.write_text(source, encoding="ascii")
    return source
