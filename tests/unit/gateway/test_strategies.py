"""Routing strategies: what each chooses, and that affinity never beats balance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.load import EndpointLoad, LoadReport
from octavo_gateway.registry import Endpoint, Strategy
from octavo_gateway.routing import Candidate, PrefixIndex, Router, RouteRequest

PLAIN = RouteRequest("m")


def fleet(*loads: int) -> list[Candidate]:
    candidates = []
    for number, in_flight in enumerate(loads):
        load = EndpointLoad()
        load.forget_report(expects_reports=False)
        load.in_flight = in_flight
        candidates.append(Candidate(Endpoint(f"r{number}", f"http://h:{number}"), load))
    return candidates


def router() -> Router:
    return Router(PrefixIndex(), random.Random(7))


def choose_and_count(r: Router, strategy: Strategy, candidates: Sequence[Candidate], request: RouteRequest) -> str:
    choice = r.choose(strategy, candidates, request)
    for clock, candidate in enumerate(candidates):
        if candidate.endpoint.id == choice.endpoint.id:
            candidate.load.in_flight += 1
            candidate.load.last_chosen = max(c.load.last_chosen for c in candidates) + 1 + 0 * clock
    return choice.endpoint.id


def test_round_robin_takes_turns() -> None:
    r, candidates = router(), fleet(9, 0, 5)
    chosen = [choose_and_count(r, Strategy.ROUND_ROBIN, candidates, PLAIN) for _ in range(6)]

    assert Counter(chosen) == {"r0": 2, "r1": 2, "r2": 2}


def test_least_loaded_counts_waiting_running_and_cache_use() -> None:
    candidates = fleet(0, 0, 0)
    candidates[0].load.update(LoadReport(waiting=0, running=4, kv_cache_utilization=0.9, at=0))
    candidates[1].load.update(LoadReport(waiting=3, running=2, kv_cache_utilization=0.1, at=0))
    candidates[2].load.update(LoadReport(waiting=0, running=4, kv_cache_utilization=0.2, at=0))

    assert router().choose(Strategy.LEAST_LOADED, candidates, PLAIN).endpoint.id == "r2"


def test_least_loaded_keeps_equal_replicas_equal() -> None:
    r, candidates = router(), fleet(0, 0, 0, 0)
    for _ in range(40):
        choose_and_count(r, Strategy.LEAST_LOADED, candidates, PLAIN)

    assert [c.load.in_flight for c in candidates] == [10, 10, 10, 10]


def test_a_weight_of_two_takes_twice_the_requests() -> None:
    r, candidates = router(), fleet(0, 0)
    candidates[0] = Candidate(Endpoint("r0", "http://h:0", weight=2.0), candidates[0].load)
    for _ in range(30):
        choose_and_count(r, Strategy.LEAST_LOADED, candidates, PLAIN)

    assert [c.load.in_flight for c in candidates] == [20, 10]


def test_power_of_two_stays_close_to_balance() -> None:
    r, candidates = router(), fleet(*[0] * 10)
    for _ in range(1_000):
        choose_and_count(r, Strategy.POWER_OF_TWO, candidates, PLAIN)

    assert max(c.load.in_flight for c in candidates) <= 105


def test_prefix_aware_returns_to_where_the_prefix_is() -> None:
    r, candidates = router(), fleet(2, 2, 2, 2)
    r.index.record("r2", (1, 2, 3, 4))
    choice = r.choose(Strategy.PREFIX_AWARE, candidates, RouteRequest("m", (1, 2, 3, 9)))

    assert choice.endpoint.id == "r2"
    assert choice.matched_blocks == 3
    assert "75% cached" in choice.reason


def test_prefix_aware_leaves_an_overloaded_replica() -> None:
    r, candidates = router(), fleet(20, 2, 2, 2)
    r.index.record("r0", (1, 2, 3, 4))
    choice = r.choose(Strategy.PREFIX_AWARE, candidates, RouteRequest("m", (1, 2, 3, 4)))

    assert choice.endpoint.id != "r0"
    assert "above the load bound" in choice.reason


def test_two_gateways_place_a_new_prefix_alike() -> None:
    request = RouteRequest("m", (42, 43))
    chosen = {router().choose(Strategy.PREFIX_AWARE, fleet(1, 1, 1, 1, 1), request).endpoint.id for _ in range(5)}

    assert len(chosen) == 1


def test_sessions_stick_and_few_move_when_a_replica_leaves() -> None:
    r, candidates = router(), fleet(*[0] * 10)
    requests = [RouteRequest("m", session=f"s{i}") for i in range(300)]
    before = [r.choose(Strategy.SESSION, candidates, q).endpoint.id for q in requests]
    after = [r.choose(Strategy.SESSION, candidates[:-1], q).endpoint.id for q in requests]

    moved = sum(1 for a, b in zip(before, after, strict=True) if a != b)
    assert moved == before.count("r9")
    assert len(set(before)) == 10


def test_a_request_without_a_session_goes_to_the_least_loaded() -> None:
    choice = router().choose(Strategy.SESSION, fleet(3, 1), PLAIN)

    assert choice.endpoint.id == "r1"
    assert "no session id" in choice.reason


def test_choosing_from_nobody_is_an_error() -> None:
    with pytest.raises(ValueError, match="no candidate"):
        router().choose(Strategy.ROUND_ROBIN, [], PLAIN)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_prefix_affinity_never_goes_above_the_load_bound(loads: list[int], prefixes: list[int], hot: int) -> None:
    """Whatever the traffic, no replica is chosen for affinity when it exceeds 1.25 x (mean + 1)."""
    r, candidates = router(), fleet(*loads)
    for number in [*prefixes, *[hot] * 20]:
        scores = {c.endpoint.id: c.score for c in candidates}
        mean = sum(scores.values()) / len(scores)
        choice = r.choose(Strategy.PREFIX_AWARE, candidates, RouteRequest("m", (number, number + 100)))
        assert scores[choice.endpoint.id] <= max(1.25 * (mean + 1), min(scores.values()))
        r.index.record(choice.endpoint.id, (number, number + 100))
        next(c for c in candidates if c.endpoint.id == choice.endpoint.id).load.in_flight += 1
