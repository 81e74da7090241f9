"""What the page shows of the ledger: this month's sums, read at most every few seconds however many pages ask."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime

from octavo_gateway.errors import GatewayError, RouteNotFoundError
from octavo_gateway.usage import Ledger, LedgerError, UsageRow, read_usage

log = logging.getLogger("octavo.gateway")

FRESH_S = 10.0
MAX_KEPT = 1_000


async def usage_rows(
    ledger: Ledger | None,
    by: tuple[str, ...],
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tenant: str | None = None,
) -> list[dict[str, object]]:
    """Sums of the ledger's records, those just written included, as JSON's objects. Raises `GatewayError`."""
    if ledger is None:
        raise RouteNotFoundError("This gateway keeps no ledger; start it with --ledger.")

    def read() -> list[UsageRow]:
        ledger.flush()
        return read_usage(ledger.location, by, since=since, until=until, tenant=tenant)

    try:
        rows = await asyncio.to_thread(read)
    except LedgerError as error:
        log.error("%s", error)
        raise GatewayError("The ledger cannot be read; the gateway's log has the details.") from None
    return [_row(by, row) for row in rows]


class UsageThisMonth:
    """One document per tenant, kept for `FRESH_S`; the one of None is about all tenants."""

    def __init__(self, ledger: Callable[[], Ledger | None], clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._kept: dict[str | None, tuple[float, asyncio.Future[bytes]]] = {}

    async def document(self, tenant: str | None) -> bytes:
        """Sums by model (of all tenants: by tenant and model) since the month began. Raises `GatewayError`."""
        now = self._clock()
        kept = self._kept.get(tenant)
        if kept is None or kept[0] < now - FRESH_S or (kept[1].done() and kept[1].exception() is not None):
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            kept = self._kept[tenant] = now, asyncio.ensure_future(self._read(tenant))
        return await asyncio.shield(kept[1])

    async def _read(self, tenant: str | None) -> bytes:
        since = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        by = ("tenant", "model") if tenant is None else ("model",)
        rows = await usage_rows(self._ledger(), by, since=since, tenant=tenant)
        return json.dumps({"since": since.date().isoformat(), "tenant": tenant, "by": by, "rows": rows}).encode()


def _row(by: tuple[str, ...], row: UsageRow) -> dict[str, object]:
    return dict(zip(by, row.group, strict=True)) | {
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "output_tokens": row.output_tokens,
        "estimated_requests": row.estimated,
        "cost": round(row.cost, 6),
    }
