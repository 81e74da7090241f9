"""The database of usage records for a cluster: one PostgreSQL behind all gateways.

A user that may only read and write rows is enough once the schema is there; only a migration needs more.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import psycopg

from octavo_gateway.usage.store import Cursor, LedgerAwayError, LedgerError, UsageStore

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
_LOCK = 0x0C7A_0001  # of all gateways that migrate this database

# One entry a version; what is released is never changed, only followed.
MIGRATIONS = (
    """
    CREATE TABLE usage (
        id TEXT PRIMARY KEY, request_id TEXT NOT NULL, tenant TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
        adapter TEXT NOT NULL, path TEXT NOT NULL, started_at DOUBLE PRECISION NOT NULL,
        duration_s DOUBLE PRECISION NOT NULL, time_to_first_byte_s DOUBLE PRECISION NOT NULL, outcome TEXT NOT NULL,
        status INTEGER NOT NULL, prompt_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL, estimated SMALLINT NOT NULL, cost DOUBLE PRECISION NOT NULL
    );
    CREATE INDEX usage_by_tenant ON usage (tenant, started_at);
    CREATE INDEX usage_by_time ON usage (started_at);
    CREATE TABLE open_requests (
        id TEXT PRIMARY KEY, source TEXT NOT NULL, run TEXT NOT NULL, line BYTEA NOT NULL
    );
    CREATE TABLE ledger_sources (source TEXT PRIMARY KEY, seen_at DOUBLE PRECISION NOT NULL)
    """,
)


class PostgresStore(UsageStore):
    """`url` is libpq's: postgresql://user:password@host:port/database?options. It never appears in a message."""

    placeholder: ClassVar[str] = "%s"

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[Any] | None = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Cursor]:
        connection = self._open()
        try:
            with connection.transaction(), connection.cursor() as cursor:
                yield cast(Cursor, cursor)
        except psycopg.Error as error:
            self.close()
            raise _away(error) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> psycopg.Connection[Any]:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        self._connection = connection = connect(self._url)
        try:
            with connection.transaction():
                self._migrate(connection)
        except psycopg.Error as error:
            self.close()
            raise _away(error) from error
        except LedgerError:
            self.close()
            raise
        return connection

    def _migrate(self, connection: psycopg.Connection[Any]) -> None:
        version = _version(connection)
        if version == len(MIGRATIONS):
            return
        if version > len(MIGRATIONS):
            raise LedgerError("usage ledger: the database was written by a newer version of Octavo")
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        connection.execute("CREATE TABLE IF NOT EXISTS ledger_schema (version INTEGER NOT NULL)")
        for script in MIGRATIONS[_version(connection) :]:
            for statement in script.split(";"):
                connection.execute(statement)
        connection.execute("DELETE FROM ledger_schema")
        connection.execute("INSERT INTO ledger_schema (version) VALUES (%s)", (len(MIGRATIONS),))


def connect(url: str) -> psycopg.Connection[Any]:
    """A connection whose transactions are explicit; raises `LedgerAwayError`, or `LedgerError` for a malformed URL."""
    try:
        return psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name="octavo-gateway",
            options=f"-c statement_timeout={STATEMENT_TIMEOUT_MS}",
        )
    except psycopg.ProgrammingError as error:
        raise LedgerError("ledger_url: is no valid PostgreSQL address") from error
    except psycopg.Error as error:
        raise _away(error) from error


def _version(connection: psycopg.Connection[Any]) -> int:
    """Of the schema in the database; 0 for an empty one."""
    (table,) = connection.execute("SELECT to_regclass('ledger_schema')").fetchone() or (None,)
    if table is None:
        return 0
    row = connection.execute("SELECT max(version) FROM ledger_schema").fetchone()
    return int(row[0] or 0) if row else 0


def _away(error: psycopg.Error) -> LedgerAwayError:
    """Without anything that a connection string could hold."""
    first_line = re.sub(r"\s+", " ", str(error).splitlines()[0]) if str(error) else type(error).__name__
    return LedgerAwayError(f"usage ledger: PostgreSQL: {first_line}")
