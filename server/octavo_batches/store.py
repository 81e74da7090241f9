"""Files and batches of tenants in one folder: records in SQLite, contents beside it. Several processes may share it."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from octavo_batches.errors import BatchError, StoreError
from octavo_batches.records import OPEN, BatchRecord, FileRecord
from octavo_batches.shared_database import open_shared_database

_BUSY_TIMEOUT_S = 10.0
_PARTIAL_S = 86_400.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER, bytes INTEGER NOT NULL,
    record BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_at INTEGER NOT NULL, is_open INTEGER NOT NULL,
    input_file_id TEXT NOT NULL, cancelling_at INTEGER, record BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant);
CREATE INDEX IF NOT EXISTS open_batches ON batches (is_open) WHERE is_open;
"""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What one tenant may have. `retention_s`: how long files and ended batches stay; None: until they are deleted."""

    files: int
    open_batches: int
    lines: int
    bytes: int | None = None
    retention_s: int | None = None


class BatchStore:
    """Every call is one short transaction, safe from any thread. Raises `BatchError` to callers.

    A batch is written by its runner alone; that it is to be cancelled is noted beside its record, by anybody.
    """

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        """Make or open the folder; raises `StoreError`."""
        self.limits = limits
        self._folder = folder
        self._lock = threading.Lock()
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            (folder / "results").mkdir(exist_ok=True)
            self._db = open_shared_database(folder / "batches.sqlite", _BUSY_TIMEOUT_S, "NORMAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{folder}: cannot be used: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # ---- files

    def add_file(self, tenant: str, filename: str, purpose: str, content: BinaryIO, file_id: str = "") -> FileRecord:
        """Keep a file; a 400 beyond what a tenant may have. Copies: call it off the event loop.

        A given `file_id` takes the place of a file of that name; results of batches are kept whatever the limits say.
        """
        is_result, file_id = bool(file_id), file_id or f"file-{uuid.uuid4().hex}"
        path = self._folder / "files" / file_id
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as sink:
                shutil.copyfileobj(content, sink)
                size = sink.tell()
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        now, retention_s = int(time.time()), self.limits.retention_s
        record = FileRecord(
            id=file_id,
            bytes=size,
            created_at=now,
            filename=filename,
            purpose=purpose,
            tenant=tenant,
            expires_at=None if retention_s is None else now + retention_s,
        )
        with self._lock, self._transaction():
            try:
                if not is_result:
                    self._check_room(tenant, size)
            except BatchError:
                partial.unlink()
                raise
            partial.replace(path)
            values = (file_id, tenant, now, record.expires_at, size, msgspec.json.encode(record))
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
        return record

    def file(self, tenant: str, file_id: str, param: str = "file_id") -> FileRecord:
        """A tenant's own file; raises a 404, also for those of others."""
        rows = self._read("SELECT record FROM files WHERE id = ? AND tenant = ?", (file_id, tenant))
        if not rows:
            raise _unknown(file_id, param)
        return msgspec.json.decode(rows[0][0], type=FileRecord)

    def files(self, tenant: str) -> list[FileRecord]:
        """A tenant's files, the newest first."""
        rows = self._read("SELECT record FROM files WHERE tenant = ? ORDER BY created_at DESC, id DESC", (tenant,))
        return [msgspec.json.decode(row[0], type=FileRecord) for row in rows]

    def content_path(self, record: FileRecord) -> Path:
        """Where a file's bytes are."""
        return self._folder / "files" / record.id

    def delete_file(self, record: FileRecord) -> None:
        """Forget a file; a 400 while a batch reads it."""
        with self._lock, self._transaction():
            if self._is_read(record.id):
                raise BatchError(400, f"file_id: {record.id} is read by a batch that has not ended", param="file_id")
            self._db.execute("DELETE FROM files WHERE id = ?", (record.id,))
        self.content_path(record).unlink(missing_ok=True)

    # ---- batches

    def add_batch(self, record: BatchRecord) -> None:
        """Keep a new batch; a 429 when too many of the tenant are open."""
        with self._lock, self._transaction():
            counted = "SELECT count(*) FROM batches WHERE tenant = ? AND is_open"
            (number,) = self._db.execute(counted, (record.tenant,)).fetchone()
            if number >= self.limits.open_batches:
                message = f"{self.limits.open_batches} batches are open already."
                raise BatchError(429, message, retry_after_s=60.0, code="open_batches")
            values = (
                record.id,
                record.tenant,
                record.created_at,
                True,
                record.input_file_id,
                msgspec.json.encode(record),
            )
            self._db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, NULL, ?)", values)

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """A tenant's own batch; raises a 404, also for those of others."""
        rows = self._read("SELECT record, cancelling_at FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant))
        if not rows:
            raise _unknown(batch_id, "batch_id")
        return _batch(rows[0])

    def batches(self, tenant: str) -> list[BatchRecord]:
        """A tenant's batches, the newest first."""
        query = "SELECT record, cancelling_at FROM batches WHERE tenant = ? ORDER BY created_at DESC, id DESC"
        return [_batch(row) for row in self._read(query, (tenant,))]

    def open_batches(self) -> list[BatchRecord]:
        """Everyone's batches that have not ended, the oldest first."""
        query = "SELECT record, cancelling_at FROM batches WHERE is_open ORDER BY created_at, id"
        return [_batch(row) for row in self._read(query, ())]

    def save(self, record: BatchRecord) -> None:
        """Write a changed batch."""
        with self._lock:
            self._db.execute(
                "UPDATE batches SET record = ?, is_open = ? WHERE id = ?",
                (msgspec.json.encode(record), record.status in OPEN, record.id),
            )

    def cancel(self, record: BatchRecord) -> None:
        """Note that a batch is to begin no further request."""
        with self._lock:
            self._db.execute(
                "UPDATE batches SET cancelling_at = ? WHERE id = ? AND is_open AND cancelling_at IS NULL",
                (int(time.time()), record.id),
            )

    def is_cancelled(self, record: BatchRecord) -> bool:
        """Whether somebody has asked for a batch's end."""
        return bool(self._read("SELECT 1 FROM batches WHERE id = ? AND cancelling_at IS NOT NULL", (record.id,)))

    def results_path(self, record: BatchRecord) -> Path:
        """Where results are collected while a batch runs."""
        return self._folder / "results" / f"{record.id}.jsonl"

    def purge(self, now: float) -> int:
        """Delete files whose time is over, and batches that ended as long ago; how many."""
        for partial in (self._folder / "files").glob("*.partial"):
            if partial.stat().st_mtime < now - _PARTIAL_S:
                partial.unlink(missing_ok=True)  # of a process that was killed while it copied
        if self.limits.retention_s is None:
            return 0
        with self._lock, self._transaction():
            rows = self._db.execute("SELECT id FROM files WHERE expires_at <= ?", (now,)).fetchall()
            gone = [row[0] for row in rows if not self._is_read(row[0])]
            self._db.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in gone])
            old = (now - self.limits.retention_s,)
            ended = self._db.execute("DELETE FROM batches WHERE NOT is_open AND created_at <= ?", old).rowcount
        for file_id in gone:
            (self._folder / "files" / file_id).unlink(missing_ok=True)
        return len(gone) + ended

    # ---- inside

    def _check_room(self, tenant: str, size: int) -> None:
        query = "SELECT count(*), coalesce(sum(bytes), 0) FROM files WHERE tenant = ?"
        count, total = self._db.execute(query, (tenant,)).fetchone()
        if count >= self.limits.files:
            raise BatchError(400, f"file: {self.limits.files} files are stored already; delete some", param="file")
        if self.limits.bytes is not None and total + size > self.limits.bytes:
            message = f"file: more than {self.limits.bytes} bytes would be stored; delete some files"
            raise BatchError(400, message, param="file")

    def _is_read(self, file_id: str) -> bool:
        query = "SELECT 1 FROM batches WHERE is_open AND input_file_id = ? LIMIT 1"
        return self._db.execute(query, (file_id,)).fetchone() is not None

    def _read(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """Takes the write lock at once, so that what is read within cannot change before what is written."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _batch(row: tuple[Any, ...]) -> BatchRecord:
    document, cancelling_at = row
    record = msgspec.json.decode(document, type=BatchRecord)
    if cancelling_at is not None and record.status in ("validating", "in_progress"):
        record.status, record.cancelling_at = "cancelling", cancelling_at
    return record


def _unknown(record_id: str, param: str) -> BatchError:
    return BatchError(404, f"{param}: there is no {record_id[:64]!r}", param=param, code="unknown_id")
