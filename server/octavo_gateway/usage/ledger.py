"""The embedded ledger: a journal that survives the process, moved in batches into SQLite, each record exactly once.

A request's begin and end are appended to the journal in the event loop (a few microseconds, no database on the hot
path). A thread moves whole journal segments into SQLite in one transaction and deletes them after the commit; the
record's id is the primary key, so a segment read twice after a crash counts once. A begin without an end, found at the
next start, becomes a record with the outcome `interrupted`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
from pathlib import Path

import msgspec

from octavo_gateway.usage.record import Begun, UsageRecord

log = logging.getLogger("octavo.gateway.usage")

FLUSH_S = 0.5
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    id TEXT PRIMARY KEY, request_id TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
    adapter TEXT NOT NULL, path TEXT NOT NULL, started_at REAL NOT NULL, duration_s REAL NOT NULL,
    time_to_first_byte_s REAL NOT NULL, outcome TEXT NOT NULL, status INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS usage_by_tenant ON usage (tenant, started_at);
CREATE INDEX IF NOT EXISTS usage_by_time ON usage (started_at);
CREATE TABLE IF NOT EXISTS open_requests (
    id TEXT PRIMARY KEY, line BLOB NOT NULL
) WITHOUT ROWID;
"""
COLUMNS = UsageRecord.__struct_fields__
_INSERT = f"INSERT OR IGNORE INTO usage ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Begun | UsageRecord)


class LedgerError(Exception):
    """The ledger cannot be used; the message says where and why."""


class Ledger:
    """One folder, one gateway process. Open it before serving, close it after the drain."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock_file = self._acquire(folder)
        self._mutex = threading.Lock()  # guards the current segment against the flusher
        self._flushing = threading.Lock()
        self._stop = threading.Event()
        self._segment_number = 0
        self._database = self._open_database(folder / "usage.sqlite")
        self.failures = 0
        self._recover()
        self._segment = self._new_segment()
        self._thread = threading.Thread(target=self._run, name="usage-ledger", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self._folder / "usage.sqlite"

    def write(self, line: Begun | UsageRecord) -> None:
        """Append to the journal; it is safe from the end of this process once this returns."""
        data = _ENCODER.encode(line) + b"\n"
        with self._mutex:
            os.write(self._segment, data)

    def flush(self) -> None:
        """Move everything written so far into SQLite."""
        with self._flushing:
            with self._mutex:
                full, self._segment = self._segment, self._new_segment()
            os.close(full)
            for segment in self._segments()[:-1]:
                self._ingest(segment)

    def close(self) -> None:
        """Move the rest and let go of the folder."""
        self._stop.set()
        self._thread.join()
        self.flush()
        os.close(self._segment)
        for segment in self._segments():
            segment.unlink()
        self._database.close()
        os.close(self._lock_file)

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_S):
            try:
                self.flush()
            except (sqlite3.Error, OSError) as error:
                self.failures += 1
                log.error("usage ledger: %s; records stay in the journal and are tried again", error)

    def _recover(self) -> None:
        """Take in what an earlier process left behind."""
        for segment in self._segments():
            self._ingest(segment)
        rows = self._database.execute("SELECT line FROM open_requests").fetchall()
        with self._database:
            for (line,) in rows:
                begun = _DECODER.decode(line)
                if isinstance(begun, Begun):
                    self._database.execute(_INSERT, _values(_interrupted(begun)))
            self._database.execute("DELETE FROM open_requests")
        if rows:
            log.warning("usage ledger: %d requests were interrupted by the end of an earlier gateway", len(rows))

    def _ingest(self, segment: Path) -> None:
        begun: dict[str, bytes] = {}
        ended: dict[str, UsageRecord] = {}
        for line in segment.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):  # a line cut by a crash while it was written
                record = _DECODER.decode(line)
                if isinstance(record, Begun):
                    begun[record.id] = line
                else:
                    ended[record.id] = record
        still_open = [(id_, line) for id_, line in begun.items() if id_ not in ended]
        with self._database:
            self._database.executemany("INSERT OR IGNORE INTO open_requests (id, line) VALUES (?, ?)", still_open)
            self._database.executemany(_INSERT, [_values(record) for record in ended.values()])
            self._database.executemany("DELETE FROM open_requests WHERE id = ?", [(id_,) for id_ in ended])
        segment.unlink()

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob("journal-*.jsonl"))

    def _new_segment(self) -> int:
        last = self._segments()[-1:]
        number = max(self._segment_number, int(last[0].stem.split("-")[1]) if last else 0) + 1
        self._segment_number = number
        path = self._folder / f"journal-{number:012d}.jsonl"
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)

    @staticmethod
    def _acquire(folder: Path) -> int:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise LedgerError(f"usage ledger {folder}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise LedgerError(f"usage ledger {folder}: another gateway uses this folder; give each its own") from None
        return lock

    @staticmethod
    def _open_database(path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, check_same_thread=False, timeout=30)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise LedgerError(f"usage ledger {path}: was written by a newer version of Octavo")
            database.executescript(SCHEMA)
            database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            database.commit()
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"usage ledger {path}: {error}") from error
        return database


def _values(record: UsageRecord) -> tuple[object, ...]:
    return tuple(getattr(record, column) for column in COLUMNS)


def _interrupted(begun: Begun) -> UsageRecord:
    return UsageRecord(
        id=begun.id,
        request_id=begun.request_id,
        tenant=begun.tenant,
        key=begun.key,
        model=begun.model,
        adapter=begun.adapter,
        path=begun.path,
        started_at=begun.started_at,
        duration_s=0.0,
        time_to_first_byte_s=0.0,
        outcome="interrupted",
        status=0,
        prompt_tokens=begun.prompt_tokens,
        cached_tokens=0,
        output_tokens=0,
        estimated=True,
        cost=0.0,
    )
