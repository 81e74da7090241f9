"""Ejection of failing replicas, the single probe afterwards, and failing open."""

from __future__ import annotations

from octavo_gateway.outliers import OutlierDetector, OutlierPolicy
from octavo_gateway.registry import Endpoint

A, B = Endpoint("a", "http://h:1"), Endpoint("b", "http://h:2")


def detector() -> OutlierDetector:
    return OutlierDetector(OutlierPolicy(consecutive_failures=3, base_s=2, max_s=10))


def fail(d: OutlierDetector, times: int, now: float = 0.0) -> list[bool]:
    return [d.failure("a", now) for _ in range(times)]


def test_three_failures_in_a_row_eject() -> None:
    d = detector()

    assert fail(d, 3) == [False, False, True]
    assert list(d.filter([A, B], 1.0)) == [B]


def test_a_success_in_between_starts_the_count_again() -> None:
    d = detector()
    fail(d, 2)
    d.success("a")
    fail(d, 2)

    assert list(d.filter([A, B], 0.0)) == [A, B]


def test_after_the_ejection_one_request_probes_and_decides() -> None:
    d = detector()
    fail(d, 3)
    assert not d.ejected("a", 2.0)
    d.chosen("a")
    assert d.ejected("a", 2.0)  # nobody else while the probe is out

    assert d.failure("a", 2.5)
    assert d.ejected("a", 2.5 + 3.9)  # twice as long
    d.chosen("a")
    d.success("a")
    assert not d.ejected("a", 7.0)


def test_a_probe_whose_client_left_lets_another_try() -> None:
    d = detector()
    fail(d, 3)
    d.chosen("a")
    d.abandoned("a")

    assert not d.ejected("a", 2.0)


def test_the_ejection_time_is_bounded() -> None:
    d, now = detector(), 0.0
    fail(d, 3)
    for _ in range(20):
        now += 10.0
        d.chosen("a")
        d.failure("a", now)

    assert not d.ejected("a", now + 10.0)


def test_ejecting_everybody_ejects_nobody() -> None:
    d = detector()
    fail(d, 3)

    assert list(d.filter([A], 0.5)) == [A]


def test_endpoints_that_are_gone_are_forgotten() -> None:
    d = detector()
    fail(d, 3)
    d.retain(set())

    assert not d.ejected("a", 0.0)
