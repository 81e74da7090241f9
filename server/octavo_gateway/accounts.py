"""Who asks, whether they may, and what it cost: joins tenants, limits, prices and the ledger around each request."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from octavo_gateway.asgi import Headers, header
from octavo_gateway.errors import AuthenticationError, GatewayError, LedgerFullError, TenantSuspendedError
from octavo_gateway.exchange import Exchange
from octavo_gateway.inspection import Inspection
from octavo_gateway.metrics import Metrics
from octavo_gateway.registry import Resolved
from octavo_gateway.tenancy import Identity, Limiter, Reservation, TenantDirectory
from octavo_gateway.tenancy.shared import SharedLimiter, SharedReservation
from octavo_gateway.usage import Begun, Ledger, LedgerAwayError, PriceTable, UsageMeter, UsageRecord, read_tenants

log = logging.getLogger("octavo.gateway.usage")

_NAMES = {"requests": b"requests", "tokens": b"tokens", "input": b"input-tokens", "output": b"output-tokens"}


@dataclass(slots=True)
class Charge:
    """One admitted request until it is settled."""

    begun: Begun
    identity: Identity | None
    reservation: Reservation | None
    shared: SharedReservation | None
    meter: UsageMeter


class Accounts:
    """Used from one event loop. Without a directory every caller is welcome and anonymous."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        directory: TenantDirectory | None = None,
        ledger: Ledger | None = None,
        prices: PriceTable | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.ledger = ledger
        self.limiter = Limiter()
        self.shared: SharedLimiter | None = None
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._prices = prices or PriceTable()
        if ledger is not None:
            metrics.watch_ledger(ledger)
        self._load_budgets()

    @property
    def counting(self) -> bool:
        """True when tokens of every request must be known."""
        return self.directory is not None or self.ledger is not None

    def set_directory(self, directory: TenantDirectory) -> None:
        """Take new tenants and keys; a key that is gone is refused from now on."""
        self.directory = directory
        self.limiter.retain(set(directory.tenants))

    def authenticate(self, exchange: Exchange) -> Identity | None:
        """The caller; None where no tenants are configured. Raises `AuthenticationError` or `TenantSuspendedError`."""
        if self.directory is None:
            return None
        given = header(exchange.headers, b"authorization") or b""
        scheme, _, key = given.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            key = (header(exchange.headers, b"x-api-key") or b"").decode("latin-1")
        identity = self.directory.authenticate(key.strip())
        if identity is None:
            raise AuthenticationError
        exchange.tenant, exchange.key_name = identity.tenant.name, identity.key_name
        if identity.tenant.suspended:
            raise TenantSuspendedError("This tenant is suspended.")
        return identity

    async def open(
        self, exchange: Exchange, identity: Identity | None, resolved: Resolved, seen: Inspection | None, strip: bool
    ) -> Charge:
        """Reserve from the tenant's limits and note the begin.

        Raises `RateLimitError`, `BudgetExceededError` or `LedgerFullError`.
        """
        if self.ledger is not None and self.ledger.is_full:
            raise LedgerFullError("Usage cannot be recorded at the moment; try again later.", retry_after_s=30.0)
        prompt, output = (seen.prompt_tokens, seen.output_tokens) if seen is not None else (0, 0)
        reservation = shared = None
        if identity is not None:
            reservation = self.limiter.reserve(identity.tenant, prompt, output, self._clock(), self._month())
            shared = await self._reserve_shared(identity, reservation)
        begun = Begun(
            id=os.urandom(16).hex(),
            request_id=exchange.request_id,
            tenant=identity.tenant.name if identity else "",
            key=identity.key_name if identity else "",
            model=resolved.entry.name,
            adapter=resolved.adapter or "",
            path=exchange.path,
            started_at=self._wall_clock(),
            prompt_tokens=prompt,
        )
        if self.ledger is not None:
            self.ledger.write(begun)
        return Charge(begun, identity, reservation, shared, UsageMeter(strip=strip))

    async def _reserve_shared(self, identity: Identity, own: Reservation) -> SharedReservation | None:
        """Reserve from the limits of all gateways; whatever prevents it, this gateway's own share is given back."""
        if self.shared is None:
            return None
        asking = asyncio.ensure_future(
            self.shared.reserve(
                os.urandom(16).hex(), identity.tenant, own.input_tokens, own.output_tokens, self._month()
            )
        )
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(self._give_back)  # the client left, but Redis has been asked
            self.limiter.settle(own, 0, 0, 0, 0.0, self._clock(), self._month())
            raise
        except GatewayError:
            self.limiter.settle(own, 0, 0, 0, 0.0, self._clock(), self._month())
            raise

    def _give_back(self, asked: asyncio.Future[SharedReservation | None]) -> None:
        if self.shared is not None and not asked.cancelled() and asked.exception() is None:
            held = asked.result()
            if held is not None:
                self.shared.settle(held, 0, 0, 0, 0.0, self._month())

    def settle(self, charge: Charge, exchange: Exchange, outcome: str) -> None:
        """Count what it really was, in the tenant's limits and in the ledger."""
        meter, begun = charge.meter, charge.begun
        served = exchange.status < 400 and exchange.bytes_sent > 0
        if meter.known or not served:
            prompt, cached, output = meter.prompt_tokens, meter.cached_tokens, meter.output_tokens
        else:
            prompt, cached, output = begun.prompt_tokens, 0, meter.events
        cost = self._prices.cost(begun.model, prompt, cached, output)
        if charge.reservation is not None:
            self.limiter.settle(charge.reservation, prompt, cached, output, cost, self._clock(), self._month())
        if charge.shared is not None and self.shared is not None:
            self.shared.settle(charge.shared, prompt, cached, output, cost, self._month())
        self._metrics.tokens(begun.model, prompt, cached, output)
        if self.ledger is not None:
            self.ledger.write(
                UsageRecord(
                    id=begun.id,
                    request_id=begun.request_id,
                    tenant=begun.tenant,
                    key=begun.key,
                    model=begun.model,
                    adapter=begun.adapter,
                    path=begun.path,
                    started_at=begun.started_at,
                    duration_s=self._clock() - exchange.started_at,
                    time_to_first_byte_s=exchange.first_byte_at - exchange.started_at if exchange.bytes_sent else 0.0,
                    outcome=outcome,
                    status=exchange.status,
                    prompt_tokens=prompt,
                    cached_tokens=cached,
                    output_tokens=output,
                    estimated=served and not meter.known,
                    cost=cost,
                )
            )

    def limit_headers(self, identity: Identity | None) -> Headers:
        """OpenAI's x-ratelimit-* headers for the limits this tenant has."""
        if identity is None:
            return []
        headers: Headers = []
        for name, (limit, left, reset_s) in self.limiter.remaining(identity.tenant, self._clock()).items():
            word = _NAMES[name]
            headers.append((b"x-ratelimit-limit-" + word, b"%d" % limit))
            headers.append((b"x-ratelimit-remaining-" + word, b"%d" % left))
            headers.append((b"x-ratelimit-reset-" + word, f"{reset_s:.3f}s".encode()))
        return headers

    def _load_budgets(self) -> None:
        if self.ledger is None:
            return
        month = self._month()
        start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
        try:
            used = read_tenants(self.ledger.location, start)
        except LedgerAwayError as error:
            log.warning("%s; budgets begin at zero until it is back", error)
            return
        for tenant, (tokens, cost) in used.items():
            self.limiter.load_month(tenant, month, tokens, cost)

    def _month(self) -> str:
        return datetime.fromtimestamp(self._wall_clock(), UTC).strftime("%Y-%m")
