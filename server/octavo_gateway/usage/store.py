"""Where usage records are kept for good: one SQL database behind the journal, SQLite or PostgreSQL.

Every statement may be repeated: the record's id is the primary key, so what is sent twice counts once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from octavo_gateway.usage.record import UsageRecord

COLUMNS = UsageRecord.__struct_fields__
_ASSIGNMENTS = ", ".join(f"{column} = excluded.{column}" for column in COLUMNS if column != "id")

# Requests that are only known to have begun belong to a source (a gateway's folder) and to one run of it.
_ADD_OPEN = "INSERT INTO open_requests (id, source, run, line) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
_CLOSE = "DELETE FROM open_requests WHERE id = ?"
_SEEN = (
    "INSERT INTO ledger_sources (source, seen_at) VALUES (?, ?) "
    "ON CONFLICT (source) DO UPDATE SET seen_at = excluded.seen_at"
)
_ADOPT = (
    "UPDATE open_requests SET source = ?, run = '' WHERE source <> ? "
    "AND source NOT IN (SELECT source FROM ledger_sources WHERE seen_at > ?)"
)
_FORGET_SOURCES = "DELETE FROM ledger_sources WHERE seen_at <= ?"
_UNFINISHED = "SELECT line FROM open_requests WHERE source = ? AND run <> ?"
# A gateway that was only cut off for long may know the true end of what another one has given up.
_ADD_USAGE = (
    f"INSERT INTO usage ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "  # noqa: S608
    f"ON CONFLICT (id) DO UPDATE SET {_ASSIGNMENTS} WHERE usage.outcome = 'interrupted'"
)


class LedgerError(Exception):
    """The ledger cannot be used; the message says where and why."""


class LedgerAwayError(LedgerError):
    """The database cannot be reached or used just now; records wait in the journal."""


class Cursor(Protocol):
    """What both drivers' cursors offer."""

    def execute(self, query: str, values: Sequence[Any] = ..., /) -> Any: ...

    def executemany(self, query: str, values: Sequence[Sequence[Any]], /) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class UsageStore(ABC):
    """A database of usage records. Not for several threads at once. Methods raise `LedgerError`."""

    placeholder: ClassVar[str] = "?"

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Cursor]:
        """All or nothing. The first one connects and brings the schema up to date.

        Raises `LedgerAwayError` where trying again may help.
        """

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""

    def add(
        self, source: str, run: str, begun: Sequence[tuple[str, bytes]], ended: Sequence[UsageRecord], now: float
    ) -> None:
        """Take records in: requests still open as (id, journal line), and those that ended. `now`: Unix seconds."""
        with self.transaction() as cursor:
            cursor.execute(self._sql(_SEEN), (source, now))
            if begun:
                cursor.executemany(self._sql(_ADD_OPEN), [(id_, source, run, line) for id_, line in begun])
            if ended:
                cursor.executemany(self._sql(_ADD_USAGE), [_values(record) for record in ended])
                cursor.executemany(self._sql(_CLOSE), [(record.id,) for record in ended])

    def unfinished(self, source: str, run: str, now: float, silent_since: float) -> list[bytes]:
        """Journal lines of requests that began in earlier runs of this source and have not ended.

        Those of sources not heard of since `silent_since` (Unix seconds) become this source's to end.
        """
        with self.transaction() as cursor:
            cursor.execute(self._sql(_SEEN), (source, now))
            cursor.execute(self._sql(_ADOPT), (source, source, silent_since))
            cursor.execute(self._sql(_FORGET_SOURCES), (silent_since,))
            cursor.execute(self._sql(_UNFINISHED), (source, run))
            return [bytes(line) for (line,) in cursor.fetchall()]

    def _sql(self, statement: str) -> str:
        return statement if self.placeholder == "?" else statement.replace("?", self.placeholder)


def _values(record: UsageRecord) -> tuple[object, ...]:
    return tuple(int(record.estimated) if c == "estimated" else getattr(record, c) for c in COLUMNS)
