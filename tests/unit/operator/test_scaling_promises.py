"""What the scaling law promises, in virtual time: prompt, no cascade, no panic without metrics, no flapping."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from octavo_operator.autoscale import workload
from octavo_operator.autoscale.laws import FormulaLaw, OctavoLaw
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.signals import Signals
from octavo_operator.autoscale.simulate import INTERVAL_S, Hardware, Report, simulate

LARGE = Hardware(cold_start_s=120.0, max_replicas=40)
SMALL = Hardware(
    kv_tokens=12_000, prefill_rate=6_000.0, decode_rate=480.0, max_num_seqs=32, cold_start_s=120.0, max_replicas=20
)
DAY_S = 86_400.0


def policy(hardware: Hardware) -> ScalingPolicy:
    return ScalingPolicy(max_replicas=hardware.max_replicas, max_num_seqs=hardware.max_num_seqs)


def wanted(report: Report, begin: float, end: float) -> list[int]:
    return [number for time, number, _ in report.timeline if begin <= time < end]


def test_a_load_step_is_answered_at_once_and_a_start_of_minutes_brings_no_cascade() -> None:
    """Twice the lasting need and one more at most: what waited for two minutes is to be gone within another."""
    lasting = max(wanted(simulate(OctavoLaw(policy(LARGE)), workload.steady(20.0, 1_500.0, 3), LARGE), 1_200, 1_500))
    report = simulate(OctavoLaw(policy(LARGE)), workload.step(2.0, 20.0, 2_700.0, 5), LARGE)
    assert wanted(report, 890, 900)[-1] == 1
    assert max(wanted(report, 900, 900 + 2 * INTERVAL_S + 1)) > 1, "two looks are enough"
    assert report.peak_replicas <= 2 * lasting + 1
    assert wanted(report, 1_700, 1_800)[-1] <= lasting + 1


class Blackout:
    """A law whose metrics are gone for a while."""

    def __init__(self, law: OctavoLaw, begin: float, end: float) -> None:
        self.name = law.name
        self._law, self._begin, self._end = law, begin, end

    def decide(self, signals: Signals, now: float) -> int:
        if self._begin <= now < self._end:
            signals = replace(signals, samples=(), held=0, arrivals=None, service_s=None)
        return self._law.decide(signals, now)


@pytest.mark.parametrize("seed", range(3))
def test_ten_minutes_without_metrics_take_no_replica_away(seed: int) -> None:
    """The load falls to almost nothing meanwhile: the law must not guess that."""
    arrivals = workload.step(1.0, 15.0, 2_700.0, seed)
    begin, end = 1_750.0, 2_350.0
    report = simulate(Blackout(OctavoLaw(policy(LARGE)), begin, end), arrivals, LARGE)
    before = wanted(report, begin - INTERVAL_S, begin)[-1]
    assert before > 1
    assert min(wanted(report, begin, end)) >= before
    assert wanted(report, 2_690, 2_700)[-1] < before, "with metrics again it goes down"


@pytest.mark.slow
def test_a_day_is_served_at_a_fair_price_without_flapping() -> None:
    """Against an oracle that starts replicas in no time and always has the fewest that serve 95 % in time."""
    low, high = 0.3, 4.0
    report = simulate(OctavoLaw(policy(SMALL)), workload.diurnal(low, high, DAY_S, 9, period_s=DAY_S), SMALL)
    assert report.slo_met >= 0.99
    assert report.replica_hours <= 1.75 * oracle_hours(low, high)
    assert report.reversals / 24 <= 2


def oracle_hours(low: float, high: float) -> float:
    """Replica-hours of the cosine's day when each rate gets just the replicas that it needs."""
    limits = [capacity(count) for count in range(1, 5)]
    rates = [(low + high) / 2 - (high - low) / 2 * math.cos(2 * math.pi * minute / 1_440) for minute in range(1_440)]
    return sum(next(n for n, limit in enumerate(limits, 1) if rate <= limit) for rate in rates) / 60


def capacity(count: int) -> float:
    """Largest steady rate, in steps of 0.2 per second, that this many replicas serve in time."""
    hardware = replace(SMALL, min_replicas=count, max_replicas=count)
    rate = 0.2
    while simulate(FormulaLaw("n", lambda s: count), workload.steady(rate, 900.0, 5), hardware).slo_met >= 0.95:
        rate += 0.2
    return rate - 0.2
