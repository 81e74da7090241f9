"""Sequences that wait for KV memory or a place in the batch, and which of them goes next."""

from __future__ import annotations

import heapq

from octavo_engine.scheduler.fairness import VirtualTokens
from octavo_engine.scheduler.sequence import Sequence

MAX_STALE = 256

Entry = tuple[float, float, int, Sequence]


class WaitingQueue:
    """Priority bands, fair between tenants inside a band, earliest deadline first inside a tenant.

    A better band goes before a worse one; but once the oldest of a worse band has waited `ageing_s`, that band gets
    one admission after every `max_passes` it was passed over, so nothing starves and urgency keeps its share. A
    sequence without a deadline counts as due `implied_deadline_s` after its arrival. Preempted sequences go first in
    their band: they have begun to answer.
    """

    def __init__(
        self,
        fairness: VirtualTokens,
        *,
        ageing_s: float = 10.0,
        max_passes: int = 8,
        implied_deadline_s: float = 60.0,
    ) -> None:
        self._fairness = fairness
        self._ageing_s = ageing_s
        self._max_passes = max_passes
        self._implied_deadline_s = implied_deadline_s
        self._waiting: dict[str, Sequence] = {}
        self._bands: dict[int, _Band] = {}
        self._pushes = 0
        self._num_stale = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def push(self, seq: Sequence) -> None:
        self._waiting[seq.request_id] = seq
        self.num_tokens += len(seq.tokens)
        self._insert(seq)

    def pop(self, *, best_band: bool = False) -> Sequence | None:
        """Take the sequence that goes next, or None when nothing waits; `push` it again if it cannot run yet.

        `best_band` skips the turn of a worse priority, whose sequence was taken and cannot run.
        """
        bands = self._waiting_bands()
        if not bands:
            return None
        turn = None if best_band else next((band for band in bands[1:] if band.passed >= self._max_passes), None)
        seq = (turn or bands[0]).pop()
        self._drop(seq)
        return seq

    def admitted(self, seq: Sequence, now: float) -> None:
        """A sequence that was popped runs now: whom did it pass?"""
        if not seq.num_preemptions:
            self._fairness.pick(seq.tenant)
        for priority, band in self._bands.items():
            if priority == seq.priority:
                band.passed = 0
            elif priority > seq.priority and not band.is_empty() and now - band.oldest_arrival() >= self._ageing_s:
                band.passed += 1

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence wherever it stands; its entries are skipped when they come up, or swept together."""
        self._drop(seq)
        self._num_stale += 1
        if self._num_stale > len(self._waiting) + MAX_STALE:
            self._sweep()

    def _insert(self, seq: Sequence) -> None:
        self._pushes += 1
        due = seq.arrival_s + self._implied_deadline_s if seq.deadline_s is None else seq.deadline_s
        band = self._bands.get(seq.priority)
        if band is None:
            band = self._bands[seq.priority] = _Band(self._waiting, self._fairness)
        band.push((due, seq.arrival_s, self._pushes, seq))

    def _sweep(self) -> None:
        """Build the bands anew from what waits."""
        passed = {priority: band.passed for priority, band in self._bands.items()}
        self._bands.clear()
        self._num_stale = 0
        for seq in self._waiting.values():
            self._insert(seq)
        for priority, band in self._bands.items():
            band.passed = passed.get(priority, 0)

    def _waiting_bands(self) -> list[_Band]:
        """Bands that hold something, best first; empty ones are forgotten."""
        for priority in [priority for priority, band in self._bands.items() if band.is_empty()]:
            del self._bands[priority]
        return [self._bands[priority] for priority in sorted(self._bands)]

    def _drop(self, seq: Sequence) -> None:
        del self._waiting[seq.request_id]
        self.num_tokens -= len(seq.tokens)


class _Band:
    """The waiting sequences of one priority."""

    def __init__(self, waiting: dict[str, Sequence], fairness: VirtualTokens) -> None:
        self._waiting = waiting
        self._fairness = fairness
        self._resumed: list[Entry] = []
        self._arrivals: list[tuple[float, int, Sequence]] = []
        self._listed: set[Sequence] = set()
        self._by_tenant: dict[str, list[Entry]] = {}
        self._tenants: list[tuple[float, str]] = []
        self.passed = 0

    def push(self, entry: Entry) -> None:
        _, arrival_s, number, seq = entry
        if seq not in self._listed:
            self._listed.add(seq)
            heapq.heappush(self._arrivals, (arrival_s, number, seq))
        if seq.num_preemptions:
            heapq.heappush(self._resumed, entry)
            return
        queue = self._by_tenant.get(seq.tenant)
        if queue is None:
            queue = self._by_tenant[seq.tenant] = []
            heapq.heappush(self._tenants, (self._fairness.service(seq.tenant), seq.tenant))
        heapq.heappush(queue, entry)

    def is_empty(self) -> bool:
        while self._arrivals and not self._is_waiting(self._arrivals[0][2]):
            self._listed.remove(heapq.heappop(self._arrivals)[2])
        return not self._arrivals

    def oldest_arrival(self) -> float:
        """Arrival of the sequence that waits longest, right after `is_empty` said there is one."""
        return self._arrivals[0][0]

    def pop(self) -> Sequence:
        """Take the next sequence; the band must not be empty."""
        if self._prune(self._resumed):
            return heapq.heappop(self._resumed)[3]
        return heapq.heappop(self._by_tenant[self._least_served()])[3]

    def _least_served(self) -> str:
        """The waiting tenant with the least service. Counters only grow, so an entry that still holds is the least."""
        while True:
            recorded, tenant = self._tenants[0]
            if not self._prune(self._by_tenant[tenant]):
                heapq.heappop(self._tenants)
                del self._by_tenant[tenant]
                continue
            service = self._fairness.service(tenant)
            if service <= recorded:
                return tenant
            heapq.heapreplace(self._tenants, (service, tenant))

    def _prune(self, queue: list[Entry]) -> bool:
        """Drop entries of sequences that do not wait any more; True if one is left."""
        while queue and not self._is_waiting(queue[0][3]):
            heapq.heappop(queue)
        return bool(queue)

    def _is_waiting(self, seq: Sequence) -> bool:
        return self._waiting.get(seq.request_id) is seq
