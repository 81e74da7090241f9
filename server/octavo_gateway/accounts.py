"""Who asks, whether they may, and what it cost: joins tenants, limits, prices and the ledger around each request."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from msgspec import structs

from octavo_gateway.asgi import Headers, header
from octavo_gateway.errors import (
    AuthenticationError,
    GatewayError,
    LedgerFullError,
    NotSyncedError,
    TenantSuspendedError,
)
from octavo_gateway.exchange import Exchange
from octavo_gateway.inspection import Inspection
from octavo_gateway.metrics import Metrics
from octavo_gateway.registry import Registry, Resolved
from octavo_gateway.tenancy import Identity, Limiter, Reservation, TenantDirectory
from octavo_gateway.tenancy.budget import Period, budgets
from octavo_gateway.tenancy.shared import SharedLimiter, SharedReservation
from octavo_gateway.usage import (
    Begun,
    Ledger,
    LedgerAwayError,
    PriceTable,
    UsageMeter,
    UsageRecord,
    interrupted,
    read_tenants,
)
from octavo_gateway.usage.collector import Consumed, UsageCollector

log = logging.getLogger("octavo.gateway.usage")

LEDGER_POLL_S = 1.0
FIND_REPLICAS_S = 30.0
"""How long a starting gateway waits for a model's replicas, to ask them about an earlier gateway's requests."""

BUDGETS_EVERY_S = 30.0
CLOSE_TIMEOUT_S = 5.0

_NAMES = {"requests": b"requests", "tokens": b"tokens", "input": b"input-tokens", "output": b"output-tokens"}


BATCH_KEY = "batch"
"""What the ledger calls the key of a batch's requests."""


@dataclass(slots=True)
class Charge:
    """One admitted request until it is settled."""

    begun: Begun
    identity: Identity | None
    reservation: Reservation | None
    shared: SharedReservation | None
    meter: UsageMeter


class Accounts:
    """Used from one event loop. Without a directory every caller is welcome and anonymous.

    Among `num_sharing` workers without Redis, each holds its part of every limit.
    """

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        directory: TenantDirectory | None = None,
        ledger: Ledger | None = None,
        prices: PriceTable | None = None,
        num_sharing: int = 1,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = None if directory is None else directory.shared_among(num_sharing)
        self.ledger = ledger
        self._num_sharing = num_sharing
        self.limiter = Limiter()
        self.shared: SharedLimiter | None = None
        self.collector: UsageCollector | None = None
        self._asking: set[asyncio.Future[Consumed | None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._prices = prices or PriceTable()
        if ledger is not None:
            metrics.watch_ledger(ledger)
        self._learn_spent(self._read_spent())

    @property
    def counting(self) -> bool:
        """True when tokens of every request must be known."""
        return self.directory is not None or self.ledger is not None

    def set_directory(self, directory: TenantDirectory) -> None:
        """Take new tenants and keys; a key that is gone is refused from now on."""
        self.directory = directory.shared_among(self._num_sharing)
        self.limiter.retain(set(directory.tenants))

    def authenticate(self, exchange: Exchange) -> Identity | None:
        """The caller; None where no tenants are configured.

        Raises `AuthenticationError`, `TenantSuspendedError`, or `NotSyncedError` before the tenants are known.
        """
        if self.directory is None:
            return None
        if not self.directory.known:
            raise NotSyncedError("This gateway is starting; send the request again.", retry_after_s=1.0)
        if exchange.batch is not None:
            tenant = self.directory.tenants.get(exchange.batch.tenant)
            identity = None if tenant is None else Identity(tenant, BATCH_KEY)
        else:
            identity = self.directory.authenticate(_key_of(exchange))
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
            reservation = self.limiter.reserve(identity.tenant, prompt, output, self._clock(), self._today())
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
        charge = Charge(begun, identity, reservation, shared, UsageMeter(strip=strip))
        if self.ledger is not None:
            try:
                self.ledger.write(begun)
            except OSError as error:
                log.error("usage ledger: %s", error)
                self._settle_limits(charge, Consumed(), 0.0)
                raise LedgerFullError("Usage cannot be recorded at the moment.", retry_after_s=30.0) from error
        return charge

    async def _reserve_shared(self, identity: Identity, own: Reservation) -> SharedReservation | None:
        """Reserve from the limits of all gateways; whatever prevents it, this gateway's own share is given back."""
        if self.shared is None:
            return None
        asking = asyncio.ensure_future(
            self.shared.reserve(
                os.urandom(16).hex(), identity.tenant, own.input_tokens, own.output_tokens, self._today()
            )
        )
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(self._give_back)  # the client left, but Redis has been asked
            self.limiter.settle(own, 0, 0, 0, 0.0, self._clock(), self._today())
            raise
        except GatewayError:
            self.limiter.settle(own, 0, 0, 0, 0.0, self._clock(), self._today())
            raise

    def _give_back(self, asked: asyncio.Future[SharedReservation | None]) -> None:
        if self.shared is not None and not asked.cancelled() and asked.exception() is None:
            held = asked.result()
            if held is not None:
                self.shared.settle(held, 0, 0, 0, 0.0, self._today())

    def settle(self, charge: Charge, exchange: Exchange, outcome: str) -> None:
        """Count what it really was, in the tenant's limits and in the ledger.

        Where the engine's count did not come with the answer, the limits take an estimate at once, and the ledger waits
        until the replica has told.
        """
        meter, begun = charge.meter, charge.begun
        served = exchange.status < 400 and exchange.bytes_sent > 0
        if meter.known or not served:
            consumed = Consumed(meter.prompt_tokens, meter.cached_tokens, meter.output_tokens)
        elif exchange.progress is not None and exchange.progress.active:
            consumed = Consumed(exchange.progress.prompt_tokens, 0, exchange.progress.num_tokens)
        else:
            consumed = Consumed(begun.prompt_tokens, 0, meter.events)
        cost = self._cost(begun.model, consumed)
        self._settle_limits(charge, consumed, cost)
        record = structs.replace(
            interrupted(begun),
            duration_s=self._clock() - exchange.started_at,
            time_to_first_byte_s=exchange.first_byte_at - exchange.started_at if exchange.bytes_sent else 0.0,
            outcome=outcome,
            status=exchange.status,
        )
        replica = exchange.replica
        if self.collector is None or meter.known or replica is None or outcome == "refused":
            self._write(record, consumed, estimated=served and not meter.known)
            return
        asking = asyncio.ensure_future(self.collector.consumed(replica, begun.id, exchange.started_at))

        resumed = exchange.progress is not None and exchange.progress.resumes > 0

        def on_told(told: asyncio.Future[Consumed | None]) -> None:
            self._asking.discard(asking)
            answer = None if told.cancelled() else told.result()
            if answer is not None and resumed and answer.output_tokens < consumed.output_tokens:
                answer = None  # it ended before it went on with what the first replica had told
            if answer is not None:
                self._correct_limits(charge, consumed, answer)
            self._write(record, answer or consumed, estimated=answer is None)

        self._asking.add(asking)
        asking.add_done_callback(on_told)

    def _settle_limits(self, charge: Charge, consumed: Consumed, cost: float) -> None:
        tokens = (consumed.prompt_tokens, consumed.cached_tokens, consumed.output_tokens)
        if charge.reservation is not None:
            self.limiter.settle(charge.reservation, *tokens, cost, self._clock(), self._today())
        if charge.shared is not None and self.shared is not None:
            self.shared.settle(charge.shared, *tokens, cost, self._today())

    def _correct_limits(self, charge: Charge, estimate: Consumed, truth: Consumed) -> None:
        """The replica has told: whoever leaves before the answer pays for what was generated all the same."""
        if charge.identity is None:
            return
        changes = (
            truth.prompt_tokens - estimate.prompt_tokens,
            truth.cached_tokens - estimate.cached_tokens,
            truth.output_tokens - estimate.output_tokens,
        )
        cost = self._cost(charge.begun.model, truth) - self._cost(charge.begun.model, estimate)
        self.limiter.correct(charge.identity.tenant.name, *changes, cost, self._clock(), self._today())
        if charge.shared is not None and self.shared is not None:
            self.shared.correct(charge.identity.tenant, *changes, cost, self._today())

    def _cost(self, model: str, consumed: Consumed) -> float:
        return self._prices.cost(model, consumed.prompt_tokens, consumed.cached_tokens, consumed.output_tokens)

    @property
    def num_unsettled(self) -> int:
        """Requests that ended and whose replica is still being asked what they consumed."""
        return len(self._asking)

    async def follow_ledger(self, registry: Registry) -> None:
        """Settle what gateways that ended in the middle have left open, and learn from the ledger what other gateways
        have spent of the budgets. Until cancelled."""
        if self.ledger is None:
            return
        budgets_read_at = self._clock()
        while True:
            if self._clock() - budgets_read_at >= BUDGETS_EVERY_S and self._has_budgets:
                self._learn_spent(await asyncio.to_thread(self._read_spent))
                budgets_read_at = self._clock()
            for begun in await asyncio.to_thread(self.ledger.take_unfinished):
                ending = asyncio.create_task(self._end(begun, registry))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
            await asyncio.sleep(LEDGER_POLL_S)

    async def close(self) -> None:
        """Write down what is still being asked for, and finish with Redis."""
        if self._asking:
            await asyncio.wait(self._asking, timeout=CLOSE_TIMEOUT_S)
        unsettled: list[asyncio.Future[Any]] = [*self._asking, *self._ending]
        for task in unsettled:
            task.cancel()
        await asyncio.gather(*unsettled, return_exceptions=True)
        if self.shared is not None:
            await self.shared.close()

    async def _end(self, begun: Begun, registry: Registry) -> None:
        """Ask every replica of its model about a request of an earlier gateway."""
        answers = await self._ask_all(begun, registry)
        known = [answer for answer in answers if answer is not None]
        best = max(known, key=lambda answer: (answer.output_tokens, answer.prompt_tokens), default=Consumed())
        found = best != Consumed() or len(known) == len(answers)
        consumed = best if found else Consumed(begun.prompt_tokens)
        self._write(interrupted(begun), consumed, estimated=not found)

    async def _ask_all(self, begun: Begun, registry: Registry) -> list[Consumed | None]:
        collector, deadline = self.collector, self._clock() + FIND_REPLICAS_S
        if collector is None:
            return [None]
        while True:
            entry = registry.snapshot.models.get(begun.model)
            if entry is not None and entry.ready:
                break
            if self._clock() >= deadline:
                return [None]
            await asyncio.sleep(LEDGER_POLL_S)
        began_at = self._clock() - max(0.0, self._wall_clock() - begun.started_at)
        return list(await asyncio.gather(*(collector.consumed(e, begun.id, began_at) for e in entry.endpoints)))

    def _write(self, record: UsageRecord, consumed: Consumed, *, estimated: bool) -> None:
        self._metrics.tokens(record.model, consumed.prompt_tokens, consumed.cached_tokens, consumed.output_tokens)
        if self.ledger is None:
            return
        final = structs.replace(
            record,
            prompt_tokens=consumed.prompt_tokens,
            cached_tokens=consumed.cached_tokens,
            output_tokens=consumed.output_tokens,
            estimated=estimated,
            cost=self._cost(record.model, consumed),
        )
        try:
            self.ledger.write(final)
        except OSError as error:  # the disk is full; the request is answered all the same
            log.error("usage ledger: request %s could not be written down: %s", record.request_id, error.strerror)

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

    @property
    def _has_budgets(self) -> bool:
        tenants = self.directory.tenants.values() if self.directory is not None else ()
        return any(tokens is not None or cost is not None for t in tenants for _, tokens, cost in budgets(t.limits))

    def _read_spent(self) -> list[tuple[str, Period, str, int, float]]:
        """What the ledger says of this day and month: tenant, period, today, tokens, cost. Slow."""
        if self.ledger is None:
            return []
        today, rows = self._today(), []
        starts = {Period.DAY: today, Period.MONTH: f"{today[:7]}-01"}
        try:
            for period, start in starts.items():
                used = read_tenants(self.ledger.location, datetime.fromisoformat(start).replace(tzinfo=UTC))
                rows += [(tenant, period, today, tokens, cost) for tenant, (tokens, cost) in used.items()]
        except LedgerAwayError as error:
            log.warning("%s; what others spend of the budgets is not known until it is back", error)
        return rows

    def _learn_spent(self, rows: list[tuple[str, Period, str, int, float]]) -> None:
        for row in rows:
            self.limiter.learn_spent(*row)

    def _today(self) -> str:
        return datetime.fromtimestamp(self._wall_clock(), UTC).date().isoformat()


def _key_of(exchange: Exchange) -> str:
    given = header(exchange.headers, b"authorization") or b""
    scheme, _, key = given.decode("latin-1").partition(" ")
    if scheme.lower() != "bearer":
        key = (header(exchange.headers, b"x-api-key") or b"").decode("latin-1")
    return key.strip()
