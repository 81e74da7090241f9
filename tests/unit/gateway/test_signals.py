"""Rates and means for the autoscaler."""

from __future__ import annotations

import pytest

from octavo_gateway.signals import DecayingRate, ModelSignals


def test_a_steady_rate_is_read_as_it_is_from_the_start_on() -> None:
    rate = DecayingRate(60)
    for tenth in range(1, 3_001):
        rate.add(tenth / 10)
        if tenth % 500 == 0:
            assert rate.rate(tenth / 10) == pytest.approx(10, rel=0.05)


def test_a_rate_forgets() -> None:
    rate = DecayingRate(60)
    for tenth in range(1_000):
        rate.add(tenth / 10)

    assert rate.rate(99.9 + 300) < 0.1
    assert DecayingRate().rate(5.0) == 0.0


def test_held_requests_without_a_ready_replica_ask_for_activation() -> None:
    account = ModelSignals()
    account.arrived(1.0)

    assert account.read("m", 2.0, held=1, oldest_held_s=1.0, ready=0).activation
    assert not account.read("m", 2.0, held=1, oldest_held_s=1.0, ready=1).activation
    assert not account.read("m", 2.0, held=0, oldest_held_s=0.0, ready=0).activation


def test_service_time_is_smoothed_from_its_first_value() -> None:
    account = ModelSignals()
    account.completed(1.0, service_s=4.0)
    account.completed(2.0, service_s=2.0)

    assert account.mean_service_s == pytest.approx(3.8)
    assert account.completions_total == 2
