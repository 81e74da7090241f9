"""The joined view of a replica's load: its reports corrected by the gateway's own count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.load import COLD_CONCURRENCY, EndpointLoad, LoadBook, LoadReport
from octavo_gateway.registry import Saturation

LINE = Saturation(queue_depth=4, kv_cache_utilization=0.9)


def report(waiting: float = 0, running: float = 0, kv: float = 0, capacity: float | None = None) -> LoadReport:
    return LoadReport(waiting, running, kv, at=0.0, capacity=capacity)


def test_requests_sent_since_the_report_are_added() -> None:
    load = EndpointLoad()
    load.in_flight = 2
    load.update(report(waiting=1, running=9))  # others' requests too
    load.in_flight = 5

    assert load.outstanding == 13
    assert load.waiting == 4


def test_a_report_older_than_a_request_never_hides_it() -> None:
    load = EndpointLoad()
    load.in_flight = 6
    load.update(report(running=2))  # read before four of the six had arrived there

    assert load.outstanding == 6


def test_a_cold_replica_gets_a_drip_not_a_flood() -> None:
    load = EndpointLoad()
    while not load.saturated(LINE):
        load.in_flight += 1

    assert load.in_flight == COLD_CONCURRENCY + LINE.queue_depth


def test_a_runtime_without_metrics_is_never_saturated() -> None:
    load = EndpointLoad()
    load.forget_report(expects_reports=False)
    load.in_flight = 1_000

    assert not load.saturated(LINE)


def test_free_slots_of_a_known_capacity_fill_before_anything_waits() -> None:
    load = EndpointLoad()
    load.update(report(running=10, capacity=32))
    load.in_flight = 22

    assert load.waiting == 0
    load.in_flight += 5
    assert load.saturated(LINE)


def test_a_full_cache_saturates_unless_the_replica_is_idle() -> None:
    load = EndpointLoad()
    load.update(report(running=1, kv=0.95))
    assert load.saturated(LINE)

    load.update(report(running=0, kv=0.95))
    assert not load.saturated(LINE)


@settings(max_examples=100)
@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1), st.integers(0, 50), st.integers(0, 50))
def test_more_load_never_scores_lower(waiting: int, running: int, kv: float, sent: int, more: int) -> None:
    load = EndpointLoad()
    load.update(report(waiting, running, kv))
    load.in_flight = sent
    before = load.score()
    load.in_flight = sent + more

    assert load.score() >= before >= 0
    assert load.score(weight=2.0) <= load.score()


def test_prompts_still_to_be_computed_count_until_their_first_byte() -> None:
    book = LoadBook()
    book.begin("long", pending_tokens=8_000)
    book.begin("short", pending_tokens=100)
    assert book["long"].score() > book["short"].score()

    book.answered("long", 8_000)
    book.answered("short", 100)
    assert book["long"].score() == book["short"].score()


def test_a_request_ends_only_if_it_began() -> None:
    book = LoadBook()
    book.begin("a")
    book.end("a")

    with pytest.raises(RuntimeError, match="never began"):
        book.end("a")


def test_gone_endpoints_are_forgotten_once_their_last_request_ends() -> None:
    book = LoadBook()
    book.begin("busy")
    book.begin("idle")
    book.end("idle")
    book.retain(set())
    assert len(book) == 1

    book.end("busy")
    book.retain(set())
    assert len(book) == 0
