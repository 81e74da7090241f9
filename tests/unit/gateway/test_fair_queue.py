"""The waiting line: bounded, fair, ordered, and it loses nobody."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.queueing import FairQueue, Ticket


def ticket(tenant: str = "a", at: float = 0.0, **fields: float) -> Ticket[str]:
    return Ticket(payload=tenant, tenant=tenant, enqueued_at=at, **({"cost": 1.0} | fields))  # type: ignore[arg-type]


def drain(queue: FairQueue[str], now: float = 0.0) -> list[str]:
    return [t.tenant for t in iter(lambda: queue.pop(now), None)]


def test_one_tenants_requests_are_served_in_order_of_arrival() -> None:
    queue: FairQueue[str] = FairQueue(10)
    tickets = [ticket() for _ in range(5)]
    for t in tickets:
        queue.push(t)

    assert [queue.pop(0.0) for _ in range(5)] == tickets
    assert queue.pop(0.0) is None


def test_a_late_small_tenant_is_served_next_to_a_big_one() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for _ in range(50):
        queue.push(ticket("big"))
    for _ in range(5):
        queue.push(ticket("small"))

    assert Counter(drain(queue)[:10])["small"] >= 4


def test_service_follows_the_weights() -> None:
    queue: FairQueue[str] = FairQueue(1_000)
    for _ in range(300):
        queue.push(ticket("heavy", weight=3.0))
        queue.push(ticket("light", weight=1.0))

    first = Counter(drain(queue)[:200])
    assert 145 <= first["heavy"] <= 155


def test_fairness_counts_tokens_not_requests() -> None:
    queue: FairQueue[str] = FairQueue(1_000)
    for _ in range(200):
        queue.push(ticket("long", cost=1_000))
        queue.push(ticket("short", cost=100))

    first = Counter(drain(queue)[:110])
    assert 8 <= first["long"] <= 12


def test_priority_goes_first_and_ageing_keeps_the_others_alive() -> None:
    queue: FairQueue[str] = FairQueue(10, ageing_s=30)
    queue.push(ticket("batch", at=0, priority=2))
    queue.push(ticket("interactive", at=1, priority=0))
    assert drain(queue, now=1) == ["interactive", "batch"]

    queue.push(ticket("batch", at=0, priority=2))
    queue.push(ticket("interactive", at=100, priority=0))
    assert drain(queue, now=100) == ["batch", "interactive"]


def test_the_earlier_deadline_goes_first_within_a_tenant() -> None:
    queue: FairQueue[str] = FairQueue(10)
    late, early = ticket(deadline=9.0), ticket(deadline=5.0)
    queue.push(late)
    queue.push(early)

    assert queue.pop(0) is early


def test_a_full_line_turns_away_the_newest_of_the_tenant_above_its_share() -> None:
    queue: FairQueue[str] = FairQueue(4)
    greedy = [ticket("greedy") for _ in range(4)]
    for t in greedy:
        queue.push(t)

    assert queue.push(ticket("modest")) is greedy[-1]
    assert queue.depth("greedy") == 3
    own = ticket("greedy")
    assert queue.push(own) is own


def test_a_ticket_can_leave_and_only_once() -> None:
    queue: FairQueue[str] = FairQueue(4)
    staying, leaving = ticket(), ticket()
    queue.push(staying)
    queue.push(leaving)

    assert queue.remove(leaving)
    assert not queue.remove(leaving)
    assert queue.pop(0) is staying
    assert not queue.remove(staying)


Steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "pop", "remove"]),
        st.sampled_from("abc"),
        st.integers(1, 50),
        st.integers(0, 2),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(Steps, st.integers(1, 12))
def test_no_ticket_is_lost_or_served_twice_and_the_bound_holds(
    steps: list[tuple[str, str, int, int]], cap: int
) -> None:
    queue: FairQueue[str] = FairQueue(cap)
    waiting: dict[int, Ticket[str]] = {}
    for now, (step, tenant, cost, priority) in enumerate(steps):
        if step == "push":
            new = ticket(tenant, at=float(now), cost=cost, priority=priority)
            waiting[id(new)] = new
            away = queue.push(new)
            if away is not None:
                del waiting[id(away)]
        elif step == "pop":
            served = queue.pop(float(now))
            assert (served is None) == (not waiting)
            if served is not None:
                del waiting[id(served)]
        elif waiting:
            leaving = next(iter(waiting.values()))
            assert queue.remove(leaving)
            del waiting[id(leaving)]
        assert len(queue) == len(waiting) <= cap
        assert sum(queue.depth(t) for t in "abc") == len(queue)

    assert {id(t) for t in iter(lambda: queue.pop(1e6), None)} == set(waiting)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=10, max_size=200))
def test_nobody_starves(tenants: list[str]) -> None:
    """However many others arrive, a waiting ticket is served within as many services as there are tenants' shares."""
    queue: FairQueue[str] = FairQueue(10_000)
    victim = ticket("victim", at=0.0)
    queue.push(victim)
    for number, tenant in enumerate(tenants):
        queue.push(ticket(tenant, at=float(number)))
        queue.push(ticket(tenant, at=float(number)))
        if queue.pop(float(number)) is victim:
            return
    raise AssertionError("the victim was never served")


def test_memory_follows_the_line_not_history() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for number in range(5_000):
        queue.push(ticket(f"tenant-{number}"))
        queue.pop(0.0)

    assert len(queue._flows) <= 66


def simulate(rates: dict[str, float], *, capacity: int, duration_s: float = 600.0, seed: int = 1) -> dict[str, float]:
    """Share of each tenant's requests that are served within three seconds of waiting, on a virtual clock.

    Eight requests run at once, a second each; arrivals are random. Nobody is served late who could be turned away.
    """
    rng = random.Random(seed)
    queue: FairQueue[str] = FairQueue(capacity)
    asked, good = Counter[str](), Counter[str]()
    arrivals = sorted(
        (at, tenant)
        for tenant, rate in rates.items()
        for at in itertools.accumulate(rng.expovariate(rate) for _ in range(int(rate * duration_s)))
    )
    ends: list[float] = [0.0] * 8  # when each place is free again

    def serve(until: float) -> None:
        """Every place that comes free until then takes the next in line."""
        while len(queue) and ends[0] <= until:
            free_at = ends[0]
            served = queue.pop(free_at)
            assert served is not None
            began = max(free_at, served.enqueued_at)
            heapq.heapreplace(ends, began + 1.0)
            good[served.tenant] += began - served.enqueued_at <= 3.0

    for at, tenant in arrivals:
        serve(at)
        asked[tenant] += 1
        queue.push(ticket(tenant, at))
        assert len(queue) <= capacity
        serve(at)
    return {tenant: good[tenant] / asked[tenant] for tenant in rates}


@pytest.mark.parametrize("capacity", [50, 2_000])
@pytest.mark.parametrize("seed", range(3))
def test_a_tenant_at_ten_times_its_share_takes_nothing_from_the_others(capacity: int, seed: int) -> None:
    """Four tenants at 1.2 of their 1.6 requests per second; the fifth asks for sixteen."""
    quiet = {f"quiet-{number}": 1.2 for number in range(4)}
    alone = simulate(quiet, capacity=capacity, seed=seed)
    crowded = simulate(quiet | {"noisy": 16.0}, capacity=capacity, seed=seed)

    assert min(alone.values()) > 0.95
    for tenant in quiet:
        assert crowded[tenant] >= 0.95 * alone[tenant]
