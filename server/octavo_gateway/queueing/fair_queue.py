"""A bounded waiting line: strict priority with ageing, weighted fair between tenants, earliest deadline within one.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996) over estimated tokens: each tenant advances a virtual
clock by cost / weight per request served, and the tenant furthest behind is served next.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """One waiting request. `priority`: lower is served earlier. `deadline` and `enqueued_at` in the caller's clock."""

    payload: T
    tenant: str
    cost: float
    enqueued_at: float
    weight: float = 1.0
    priority: int = 0
    deadline: float = math.inf
    sequence: int = 0
    waiting: bool = field(default=False, repr=False)

    def __lt__(self, other: Ticket[T]) -> bool:
        return (self.priority, self.deadline, self.sequence) < (other.priority, other.deadline, other.sequence)


class _Flow(Generic[T]):
    """One tenant's part of the line and its virtual time."""

    __slots__ = ("count", "heap", "served", "weight")

    def __init__(self) -> None:
        self.heap: list[Ticket[T]] = []
        self.count = 0
        self.served = 0.0
        self.weight = 1.0


class FairQueue(Generic[T]):
    """Holds at most `capacity` tickets. Pure: time comes in as an argument."""

    def __init__(self, capacity: int, ageing_s: float = 30.0) -> None:
        self.capacity = capacity
        self._ageing_s = ageing_s
        self._flows: dict[str, _Flow[T]] = {}
        self._virtual_time = 0.0
        self._sequence = itertools.count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def depth(self, tenant: str) -> int:
        """Tickets of one tenant."""
        flow = self._flows.get(tenant)
        return flow.count if flow else 0

    def push(self, ticket: Ticket[T]) -> Ticket[T] | None:
        """Add a ticket. When full, make room by turning away the newest ticket of the tenant furthest above its share,
        which may be the new ticket itself. Returns the ticket turned away, if any."""
        turned_away: Ticket[T] | None = None
        if self._size >= self.capacity:
            victim_tenant = self._most_over_share(ticket)
            if victim_tenant is None:
                return ticket
            turned_away = max((t for t in self._flows[victim_tenant].heap if t.waiting), key=lambda t: t.sequence)
            self.remove(turned_away)
        flow = self._flow(ticket.tenant, ticket.weight)
        ticket.sequence = next(self._sequence)
        ticket.waiting = True
        heapq.heappush(flow.heap, ticket)
        flow.count += 1
        self._size += 1
        return turned_away

    def pop(self, now: float) -> Ticket[T] | None:
        """Take the ticket to serve next, or None when nobody waits."""
        heads = [(flow, head) for flow in self._flows.values() if (head := self._head(flow)) is not None]
        if not heads:
            return None
        most_urgent = min(head.priority for _, head in heads)
        chosen, _ = min(
            heads, key=lambda pair: (self._band(pair[1], most_urgent, now), pair[0].served, pair[1].sequence)
        )
        ticket = heapq.heappop(chosen.heap)
        self._leave(ticket, chosen)
        self._virtual_time = max(self._virtual_time, chosen.served)
        chosen.served += ticket.cost / chosen.weight
        self._forget_idle()
        return ticket

    def remove(self, ticket: Ticket[T]) -> bool:
        """Take a ticket out (its client left, or its deadline passed). False when it no longer waits."""
        if not ticket.waiting:
            return False
        self._leave(ticket, self._flows[ticket.tenant])
        return True

    def charge(self, tenant: str, weight: float, cost: float) -> None:
        """Count service given without waiting, or (negative) give back what was over-estimated."""
        flow = self._flow(tenant, weight)
        flow.served += cost / flow.weight
        if cost < 0:
            flow.served = max(flow.served, self._virtual_time) if flow.count == 0 else max(flow.served, 0.0)

    def _flow(self, tenant: str, weight: float) -> _Flow[T]:
        flow = self._flows.get(tenant)
        if flow is None:
            flow = self._flows[tenant] = _Flow()
            flow.served = self._virtual_time
        elif flow.count == 0:
            flow.served = max(flow.served, self._virtual_time)
        flow.weight = max(weight, 1e-6)
        return flow

    def _band(self, ticket: Ticket[T], most_urgent: int, now: float) -> int:
        """Age lifts a ticket up to the most urgent of those that wait and never above them: else a tenant that floods
        the line would be served first for having waited long."""
        aged = int(max(0.0, now - ticket.enqueued_at) / self._ageing_s) if self._ageing_s > 0 else 0
        return max(most_urgent, ticket.priority - aged)

    def _head(self, flow: _Flow[T]) -> Ticket[T] | None:
        while flow.heap and not flow.heap[0].waiting:
            heapq.heappop(flow.heap)
        return flow.heap[0] if flow.heap else None

    def _leave(self, ticket: Ticket[T], flow: _Flow[T]) -> None:
        ticket.waiting = False
        flow.count -= 1
        self._size -= 1
        if flow.count == 0:
            flow.heap.clear()
        elif len(flow.heap) > 2 * flow.count + 16:
            flow.heap = [t for t in flow.heap if t.waiting]
            heapq.heapify(flow.heap)

    def _forget_idle(self) -> None:
        """Drop tenants that neither wait nor are ahead of the virtual clock: memory follows the line, not history.

        An empty line ends the busy period: nobody is owed anything any more.
        """
        if self._size == 0:
            self._flows.clear()
            return
        if len(self._flows) <= 64:
            return
        for tenant in [t for t, f in self._flows.items() if f.count == 0 and f.served <= self._virtual_time]:
            del self._flows[tenant]

    def _most_over_share(self, newcomer: Ticket[T]) -> str | None:
        """The tenant to take room from, or None when the newcomer's own tenant holds the most per weight."""
        own = self._flows.get(newcomer.tenant)
        own_share = ((own.count if own else 0) + 1) / max(newcomer.weight, 1e-6)
        heaviest, tenant = own_share, None
        for name, flow in self._flows.items():
            if name != newcomer.tenant and flow.count / flow.weight > heaviest:
                heaviest, tenant = flow.count / flow.weight, name
        return tenant
