"""The embedded database of usage records: one file, several processes, crash-safe."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from octavo_batches.shared_database import open_shared_database
from octavo_gateway.usage.store import Cursor, LedgerAwayError, LedgerError, UsageStore

BUSY_TIMEOUT_S = 30.0

# One entry a version; what is released is never changed, only followed.
MIGRATIONS = (
    """
    CREATE TABLE IF NOT EXISTS usage (
        id TEXT PRIMARY KEY, request_id TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
        adapter TEXT NOT NULL, path TEXT NOT NULL, started_at REAL NOT NULL, duration_s REAL NOT NULL,
        time_to_first_byte_s REAL NOT NULL, outcome TEXT NOT NULL, status INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
        estimated INTEGER NOT NULL, cost REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS usage_by_tenant ON usage (tenant, started_at);
    CREATE INDEX IF NOT EXISTS usage_by_time ON usage (started_at);
    CREATE TABLE IF NOT EXISTS open_requests (id TEXT PRIMARY KEY, line BLOB NOT NULL) WITHOUT ROWID;
    """,
    """
    ALTER TABLE open_requests ADD COLUMN source TEXT NOT NULL DEFAULT '';
    ALTER TABLE open_requests ADD COLUMN run TEXT NOT NULL DEFAULT '';
    CREATE TABLE ledger_sources (source TEXT PRIMARY KEY, seen_at REAL NOT NULL) WITHOUT ROWID;
    """,
)


class SqliteStore(UsageStore):
    """A file that belongs to this machine's gateways alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        try:
            self._database = database = open_shared_database(self._path, BUSY_TIMEOUT_S, "FULL")
            with self.transaction():
                self._migrate(database)
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"usage ledger {self._path}: {error}") from error
        except LedgerError:
            self.close()  # what could not be migrated is not used
            raise
        return database

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Cursor]:
        database = self._open()
        try:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database.cursor()
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise LedgerAwayError(f"usage ledger {self._path}: {error}") from error

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _migrate(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise LedgerError(f"usage ledger {self._path}: was written by a newer version of Octavo")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            for statement in script.split(";"):
                if statement.strip():
                    database.execute(statement)
            database.execute(f"PRAGMA user_version={number}")
