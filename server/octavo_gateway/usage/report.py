"""Sums over the ledger: by tenant, key, model, outcome, day or month."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from octavo_gateway.usage.ledger import LedgerError

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
    path: Path,
    by: tuple[str, ...] = ("tenant",),
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tenant: str | None = None,
) -> list[UsageRow]:
    """Sum the records that began in [since, until). Reads beside a running gateway. Raises `LedgerError`."""
    columns = [GROUPS[name] for name in by]
    conditions, values = ["1"], []
    for condition, value in (
        ("started_at >= ?", since.timestamp() if since else None),
        ("started_at < ?", until.timestamp() if until else None),
        ("tenant = ?", tenant),
    ):
        if value is not None:
            conditions.append(condition)
            values.append(value)
    query = (
        f"SELECT {', '.join(columns)}, count(*), sum(prompt_tokens), sum(cached_tokens), sum(output_tokens), "  # noqa: S608
        f"sum(estimated), sum(cost) FROM usage WHERE {' AND '.join(conditions)} "
        f"GROUP BY {', '.join(columns)} ORDER BY {', '.join(columns)}"
    )
    if not path.is_file():
        raise LedgerError(f"usage ledger: no file at {path}")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
            rows = database.execute(query, values).fetchall()
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"usage ledger {path}: {error}") from error
    width = len(columns)
    return [UsageRow(tuple(str(part) for part in row[:width]), *row[width:]) for row in rows]


def read_month(path: Path, month_start: datetime) -> dict[str, tuple[int, float]]:
    """Tokens and cost per tenant since the start of a month, to fill the budgets at start."""
    rows = read_usage(path, ("tenant",), since=month_start)
    return {row.group[0]: (row.prompt_tokens + row.output_tokens, row.cost) for row in rows}
