"""Late binding: gives each request a replica at once when one has room, else lets it wait here, fairly and bounded.

Requests bind to a replica only when that replica is below its saturation line, so a new or freed replica helps the
longest waiting request at once. All methods are called from one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from octavo_gateway.canary import CanaryShare, Track, TrackRecord, track_of
from octavo_gateway.errors import ModelNotFoundError, NoReplicaInTimeError, QueueFullError
from octavo_gateway.load import LoadBook
from octavo_gateway.outliers import OutlierDetector
from octavo_gateway.queueing import FairQueue, Ticket
from octavo_gateway.registry import Endpoint, EndpointState, ModelEntry, Registry, Snapshot
from octavo_gateway.routing import Candidate, Choice, Router, RouteRequest
from octavo_gateway.signals import GatewaySignals, ModelSignals

TICK_S = 0.1
"""How often waiting requests are looked at again for reasons that raise no event (an ejection that ends)."""

DEFAULT_STARTUP_S = 30.0
RETRY_AFTER_BOUNDS_S = (1.0, 300.0)


@dataclass(frozen=True, slots=True)
class Turn:
    """A request's place in the line. `priority`: lower is served earlier; `cost` in estimated tokens."""

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    cost: float = 1.0
    deadline: float = math.inf
    max_queued: int | None = None  # of this tenant in this model's line


@dataclass(slots=True, eq=False)
class Lease:
    """The right to send one request to `choice.endpoint`; must be released exactly once."""

    entry: ModelEntry
    choice: Choice
    leased_at: float
    pending_tokens: float = 0.0  # of the prompt, until the first byte of the answer
    held_s: float = 0.0
    released: bool = False
    failed: bool | None = None  # None while it is not known whether the replica served it well

    @property
    def endpoint(self) -> Endpoint:
        return self.choice.endpoint


@dataclass(slots=True, eq=False)
class _Waiter:
    route: RouteRequest
    excluded: frozenset[str]
    granted: asyncio.Future[Lease]


@dataclass(slots=True, eq=False)
class _Line:
    """The waiting line and account of one model."""

    queue: FairQueue[_Waiter]
    signals: ModelSignals = field(default_factory=ModelSignals)
    share: CanaryShare = field(default_factory=CanaryShare)
    waiting: dict[int, Ticket[_Waiter]] = field(default_factory=dict)  # insertion ordered: the first is the oldest


class Dispatcher:
    """Grants leases on endpoints of the registry's models. `num_sharing` workers share the bounds of each line."""

    def __init__(
        self,
        registry: Registry,
        router: Router,
        loads: LoadBook,
        outliers: OutlierDetector,
        clock: Callable[[], float],
        *,
        num_sharing: int = 1,
    ) -> None:
        self._registry = registry
        self._num_sharing = num_sharing
        self._router = router
        self._loads = loads
        self._outliers = outliers
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._first_seen: dict[str, float] = {}
        self._startups: dict[str, deque[float]] = {}
        registry.subscribe(self._on_change)
        self._on_change(registry.snapshot)

    # ---- the life of a lease

    def arrived(self, entry: ModelEntry) -> None:
        """Count an accepted request, once, whatever becomes of it."""
        self._line(entry).signals.arrived(self._clock())

    def try_acquire(
        self, entry: ModelEntry, route: RouteRequest, excluded: frozenset[str] = frozenset()
    ) -> Lease | None:
        """A lease right now, or None when the request would have to wait."""
        entry = self._current(entry)
        line = self._line(entry)
        if len(line.queue) > 0:
            return None
        candidates = self._candidates(entry)
        offered = line.share.offer(entry, candidates)
        return self._grant(entry, offered, candidates, route, excluded) if offered else None

    async def acquire(
        self, entry: ModelEntry, route: RouteRequest, turn: Turn, excluded: frozenset[str] = frozenset()
    ) -> Lease:
        """A lease, after waiting for one if need be.

        Raises `QueueFullError` at once when the line is full, `NoReplicaInTimeError` after the hold time.
        """
        lease = self.try_acquire(entry, route, excluded)
        if lease is not None:
            return lease
        return await self._wait(entry, route, turn, excluded)

    def release(self, lease: Lease) -> None:
        """Give a lease back; the next in line may get the room."""
        if lease.released:
            raise RuntimeError(f"lease on {lease.endpoint.id} released twice")
        lease.released = True
        self._prompt_done(lease)
        self._loads.end(lease.endpoint.id)
        line = self._line(lease.entry)
        if lease.failed is not None and lease.entry.canary_weight is not None:
            line.share.tracks[track_of(lease.endpoint)].ended(failed=lease.failed)
        line.signals.in_flight -= 1
        if len(line.queue):
            self._drain(lease.entry.name)
        elif line.signals.in_flight == 0 and lease.entry.name not in self._registry.snapshot.models:
            self._lines.pop(lease.entry.name, None)

    def first_byte(self, lease: Lease) -> None:
        """The replica of this lease has begun to answer."""
        self._prompt_done(lease)
        self._outliers.success(lease.endpoint.id)
        line, took_s = self._line(lease.entry), self._clock() - lease.leased_at
        line.signals.first_byte(took_s)
        if lease.entry.canary_weight is not None:
            line.share.tracks[track_of(lease.endpoint)].first_byte(took_s)

    def _prompt_done(self, lease: Lease) -> None:
        self._loads.answered(lease.endpoint.id, lease.pending_tokens)
        lease.pending_tokens = 0.0

    def completed(self, lease: Lease) -> None:
        """The replica of this lease has answered in full."""
        now = self._clock()
        lease.failed = bool(lease.failed)
        self._line(lease.entry).signals.completed(now, now - lease.leased_at)

    def failed(self, lease: Lease) -> bool:
        """The replica of this lease failed it. True when that ejects the replica for a while."""
        lease.failed = True
        return self._outliers.failure(lease.endpoint.id, self._clock())

    def abandoned(self, lease: Lease) -> None:
        """The request of this lease ended without saying anything about its replica."""
        self._outliers.abandoned(lease.endpoint.id)

    # ---- news

    def loads_changed(self) -> None:
        """A replica reported: somebody may have room now."""
        for name, line in list(self._lines.items()):
            if len(line.queue):
                self._drain(name)

    def signals(self, model: str) -> GatewaySignals:
        """What the autoscaler wants to know of a model."""
        entry = self._registry.snapshot.models.get(model)
        line = self._lines.get(model)
        if line is None:
            return GatewaySignals(model=model)
        now = self._clock()
        oldest = next(iter(line.waiting.values()), None)
        return line.signals.read(
            model,
            now,
            held=len(line.queue),
            oldest_held_s=now - oldest.enqueued_at if oldest else 0.0,
            ready=len(entry.ready) if entry else 0,
        )

    def tracks(self, model: str) -> Mapping[Track, TrackRecord]:
        """How the revisions of a model fare beside each other; empty for one that had no request yet."""
        line = self._lines.get(model)
        return line.share.tracks if line is not None else {}

    def position(self, model: str) -> int:
        """How many requests wait for this model."""
        line = self._lines.get(model)
        return len(line.queue) if line else 0

    def retry_after_s(self, entry: ModelEntry) -> float:
        """When trying again makes sense: the learned start-up time if nothing is ready, else when the line is gone."""
        low, high = RETRY_AFTER_BOUNDS_S
        line = self._line(entry)
        if not entry.ready:
            learned = self._startups.get(entry.name)
            return min(max(statistics.median(learned) if learned else DEFAULT_STARTUP_S, low), high)
        rate = line.signals.completion_rate(self._clock())
        if rate > 0:
            return min(max(len(line.queue) / rate, low), high)
        return min(max(line.signals.mean_service_s, low), high)

    # ---- inside

    def _current(self, entry: ModelEntry) -> ModelEntry:
        """The newest view of a model; raises `ModelNotFoundError` when it is served no more."""
        snapshot = self._registry.snapshot
        current = snapshot.models.get(entry.name)
        if current is None:
            raise ModelNotFoundError(entry.name, [name for name, _ in snapshot.listing()])
        return current

    async def _wait(self, entry: ModelEntry, route: RouteRequest, turn: Turn, excluded: frozenset[str]) -> Lease:
        loop = asyncio.get_running_loop()
        line = self._line(entry)
        line.queue.capacity = self._part(entry.hold.max_held_requests)
        if turn.max_queued is not None and line.queue.depth(turn.tenant) >= self._part(turn.max_queued):
            raise QueueFullError(
                f"Limit of {turn.max_queued} waiting requests reached.", retry_after_s=self.retry_after_s(entry)
            )
        now = self._clock()
        waiter = _Waiter(route, excluded, loop.create_future())
        deadline = min(turn.deadline, now + entry.hold.hold_timeout_s)
        ticket = Ticket(waiter, turn.tenant, turn.cost, now, turn.weight, turn.priority, deadline)
        turned_away = line.queue.push(ticket)
        if turned_away is not None:
            self._forget(line, turned_away)
            self._refuse(entry, turned_away)
        if turned_away is not ticket:
            line.waiting[id(ticket)] = ticket
        timer = loop.call_later(max(0.0, deadline - now), self._expire, entry, line, ticket)
        self._arm()
        try:
            lease = await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._outliers.abandoned(waiter.granted.result().endpoint.id)
                self.release(waiter.granted.result())
            raise
        finally:
            timer.cancel()
            line.queue.remove(ticket)
            self._forget(line, ticket)
        lease.held_s = self._clock() - now
        return lease

    def _part(self, bound: int) -> int:
        """Of a bound on the line that this worker may fill."""
        return max(1, bound // self._num_sharing)

    def _refuse(self, entry: ModelEntry, ticket: Ticket[_Waiter]) -> None:
        if not ticket.payload.granted.done():
            ticket.payload.granted.set_exception(
                QueueFullError(
                    f"The waiting line of model {entry.name!r} is full ({entry.hold.max_held_requests} requests).",
                    retry_after_s=self.retry_after_s(entry),
                )
            )

    def _expire(self, entry: ModelEntry, line: _Line, ticket: Ticket[_Waiter]) -> None:
        if line.queue.remove(ticket) and not ticket.payload.granted.done():
            waited = self._clock() - ticket.enqueued_at
            current = self._registry.snapshot.models.get(entry.name, entry)
            state = "every replica is busy" if current.ready else "no replica is ready yet"
            ticket.payload.granted.set_exception(
                NoReplicaInTimeError(
                    f"Model {entry.name!r}: {state}; gave up after {waited:.0f} s of waiting.",
                    retry_after_s=self.retry_after_s(current),
                )
            )

    def _forget(self, line: _Line, ticket: Ticket[_Waiter]) -> None:
        line.waiting.pop(id(ticket), None)

    def _drain(self, model: str) -> None:
        """Serve the line while some replica has room."""
        line = self._lines[model]
        entry = self._registry.snapshot.models.get(model)
        if entry is None:
            return
        while len(line.queue):
            candidates = self._candidates(entry)
            offered = line.share.offer(entry, candidates)
            if not offered:
                return
            ticket = line.queue.pop(self._clock())
            if ticket is None:
                return
            self._forget(line, ticket)
            waiter = ticket.payload
            if not waiter.granted.done():
                lease = self._grant(entry, offered, candidates, waiter.route, waiter.excluded)
                waiter.granted.set_result(lease)

    def _candidates(self, entry: ModelEntry) -> list[Candidate]:
        """Ready, not ejected, below the saturation line."""
        endpoints = self._outliers.filter(entry.ready, self._clock())
        candidates = [Candidate(e, self._loads[e.id]) for e in endpoints]
        return [c for c in candidates if not c.load.saturated(entry.saturation)]

    def _grant(
        self,
        entry: ModelEntry,
        offered: Sequence[Candidate],
        candidates: Sequence[Candidate],
        route: RouteRequest,
        excluded: frozenset[str],
    ) -> Lease:
        """Prefer a replica that has not failed this request, of either track. A request for an adapter goes to a busy
        replica that holds it rather than to one that would not know it; where none is known to hold it, to any."""
        if excluded:
            untried = [c for c in offered if c.endpoint.id not in excluded]
            offered = untried or [c for c in candidates if c.endpoint.id not in excluded] or offered
        if route.adapter is not None:
            holders = [e for e in entry.ready if route.adapter in e.adapters]
            free = [c for c in offered if c.endpoint in holders]
            offered = free or [Candidate(e, self._loads[e.id]) for e in holders] or offered
        choice = self._router.choose(entry.strategy, offered, route)
        fresh = 1.0 - choice.matched_blocks / len(route.prefix) if route.prefix else 1.0
        pending_tokens = route.prompt_tokens * fresh
        self._loads.begin(choice.endpoint.id, pending_tokens)
        self._outliers.chosen(choice.endpoint.id)
        line = self._line(entry)
        line.signals.in_flight += 1
        line.share.granted(entry, choice.endpoint)
        return Lease(entry, choice, self._clock(), pending_tokens)

    def _line(self, entry: ModelEntry) -> _Line:
        line = self._lines.get(entry.name)
        if line is None:
            line = self._lines[entry.name] = _Line(FairQueue(self._part(entry.hold.max_held_requests)))
        return line

    def _arm(self) -> None:
        if self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        self.loads_changed()
        if any(len(line.queue) for line in self._lines.values()):
            self._arm()

    def _on_change(self, snapshot: Snapshot) -> None:
        alive = {e.id for entry in snapshot.models.values() for e in entry.endpoints}
        self._loads.retain(alive)
        self._outliers.retain(alive)
        self._router.index.retain(alive)
        self._learn_startups(snapshot, alive)
        for name in [n for n in self._lines if n not in snapshot.models]:
            self._dissolve(name, snapshot)
        with contextlib.suppress(RuntimeError):  # no running loop yet: then nobody waits either
            asyncio.get_running_loop()
            self.loads_changed()

    def _dissolve(self, name: str, snapshot: Snapshot) -> None:
        """The model is served no more: tell those who wait for it."""
        line = self._lines[name]
        while (ticket := line.queue.pop(self._clock())) is not None:
            self._forget(line, ticket)
            if not ticket.payload.granted.done():
                ticket.payload.granted.set_exception(
                    ModelNotFoundError(name, [known for known, _ in snapshot.listing()])
                )
        if line.signals.in_flight == 0:
            del self._lines[name]

    def _learn_startups(self, snapshot: Snapshot, alive: set[str]) -> None:
        now = self._clock()
        for entry in snapshot.models.values():
            for endpoint in entry.endpoints:
                if endpoint.state is EndpointState.STARTING:
                    self._first_seen.setdefault(endpoint.id, now)
                elif endpoint.state is EndpointState.READY and endpoint.id in self._first_seen:
                    took = now - self._first_seen.pop(endpoint.id)
                    self._startups.setdefault(entry.name, deque(maxlen=10)).append(took)
        for gone in [i for i in self._first_seen if i not in alive]:
            del self._first_seen[gone]
        for gone in [n for n in self._startups if n not in snapshot.models]:
            del self._startups[gone]
