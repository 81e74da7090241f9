"""Sums over the ledger: by tenant, key, model, outcome, day or month."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from octavo_gateway.usage.postgres import connect
from octavo_gateway.usage.store import LedgerAwayError, LedgerError

GROUPS: dict[str, str] = {
    "tenant": "tenant",
    "key": "tenant || '/' || key",
    "model": "model",
    "adapter": "adapter",
    "outcome": "outcome",
    "day": "strftime('%Y-%m-%d', started_at, 'unixepoch')",
    "month": "strftime('%Y-%m', started_at, 'unixepoch')",
}
"""What may be grouped by, and the SQL for it; nothing a user types becomes SQL."""

_POSTGRES_GROUPS = GROUPS | {
    "day": "to_char(to_timestamp(started_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "month": "to_char(to_timestamp(started_at) AT TIME ZONE 'UTC', 'YYYY-MM')",
}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums of one group. `estimated` counts requests whose tokens the engine could not tell."""

    group: tuple[str, ...]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    estimated: int
    cost: float


def read_usage(
    location: Path | str,
    by: tuple[str, ...] = ("tenant",),
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tenant: str | None = None,
) -> list[UsageRow]:
    """Sum the records that began in [since, until), from a SQLite file or a PostgreSQL URL.

    Reads beside running gateways. Raises `LedgerError`.
    """
    in_file = isinstance(location, Path)
    columns = [(GROUPS if in_file else _POSTGRES_GROUPS)[name] for name in by]
    conditions: list[str] = []
    values: list[object] = []
    for condition, value in (
        ("started_at >= ", since.timestamp() if since else None),
        ("started_at < ", until.timestamp() if until else None),
        ("tenant = ", tenant),
    ):
        if value is not None:
            conditions.append(condition + ("?" if in_file else "%s"))
            values.append(value)
    places = ", ".join(str(number + 1) for number in range(len(columns)))
    query = (
        f"SELECT {', '.join(columns)}, count(*), sum(prompt_tokens), sum(cached_tokens), sum(output_tokens), "  # noqa: S608
        f"sum(estimated), sum(cost) FROM usage WHERE {' AND '.join(conditions) or '1 = 1'} "
        f"GROUP BY {places}"
    )
    rows = _read_file(location, query, values) if isinstance(location, Path) else _read_url(location, query, values)
    width = len(columns)
    found = [_row(row, width) for row in rows]
    return sorted(found, key=lambda row: row.group)  # the same order whatever a database's collation is


def _row(row: Sequence[Any], width: int) -> UsageRow:
    requests, prompt, cached, output, estimated, cost = row[width:]
    group = tuple(str(part) for part in row[:width])
    return UsageRow(group, int(requests), int(prompt), int(cached), int(output), int(estimated), float(cost))


def read_tenants(location: Path | str, since: datetime) -> dict[str, tuple[int, float]]:
    """Tokens and cost per tenant since a moment, to fill the budgets. Raises `LedgerError`."""
    rows = read_usage(location, ("tenant",), since=since)
    return {row.group[0]: (row.prompt_tokens + row.output_tokens, row.cost) for row in rows}


def _read_file(path: Path, query: str, values: Sequence[object]) -> list[Any]:
    if not path.is_file():
        raise LedgerError(f"usage ledger: no file at {path}")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
            return database.execute(query, values).fetchall()
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"usage ledger {path}: {error}") from error


def _read_url(url: str, query: str, values: Sequence[object]) -> list[Any]:
    with contextlib.closing(connect(url)) as connection:
        try:
            return connection.execute(query, values).fetchall()
        except psycopg.Error as error:
            raise LedgerAwayError(f"usage ledger: PostgreSQL: {type(error).__name__}") from error
