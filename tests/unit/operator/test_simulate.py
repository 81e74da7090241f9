from __future__ import annotations

import pytest

from octavo_operator.autoscale import workload
from octavo_operator.autoscale.laws import FormulaLaw, OctavoLaw, all_laws, hpa_kv, keda_queue
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.signals import ReplicaSample, Signals
from octavo_operator.autoscale.simulate import Hardware, simulate

FAST = Hardware(cold_start_s=20.0, max_replicas=8)
POLICY = ScalingPolicy(min_replicas=1, max_replicas=8)


def test_a_trace_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert workload.steady(2.0, 100.0, 1) == workload.steady(2.0, 100.0, 1)
    assert workload.steady(2.0, 100.0, 1) != workload.steady(2.0, 100.0, 2)


def test_rates_of_traces_are_what_they_say() -> None:
    assert len(workload.constant(2.0, 100.0)) == 200
    assert len(workload.steady(5.0, 2_000.0, 3)) == pytest.approx(10_000, rel=0.05)
    middle = [a for a in workload.step(1.0, 9.0, 900.0, 3) if 300 <= a.time < 600]
    assert len(middle) == pytest.approx(2_700, rel=0.1)


def test_recorded_traces_begin_at_zero_and_bad_lines_are_named() -> None:
    lines = ["time,input_tokens,output_tokens", "100,5,6", "101.5,7,8"]
    assert [(a.time, a.input_tokens) for a in workload.recorded(lines)] == [(0.0, 5), (1.5, 7)]
    with pytest.raises(ValueError, match="line 3"):
        list(workload.recorded([*lines[:2], "x,7,8"]))


def test_every_request_of_a_light_load_is_served_in_time() -> None:
    report = simulate(FormulaLaw("one", lambda s: 1.0), workload.constant(0.5, 300.0), FAST)
    assert (report.requests, report.slo_met, report.peak_replicas) == (150, 1.0, 1)
    assert report.replica_hours == pytest.approx(300 / 3600, rel=0.1)


def test_an_overload_on_one_replica_misses_and_scaling_helps() -> None:
    arrivals = workload.steady(14.0, 600.0, 5)
    alone = simulate(FormulaLaw("one", lambda s: 1.0), arrivals, FAST)
    scaled = simulate(OctavoLaw(POLICY), arrivals, FAST)
    assert scaled.slo_met > alone.slo_met
    assert scaled.peak_replicas > 1
    assert scaled.replica_hours > alone.replica_hours


def test_our_law_does_not_flap_on_a_steady_load() -> None:
    report = simulate(OctavoLaw(POLICY), workload.steady(6.0, 1_200.0, 7), FAST)
    assert report.reversals <= 2


def test_a_load_step_with_a_slow_start_is_never_answered_with_more_than_the_bounds_nor_a_cascade() -> None:
    """While replicas load, the wish must not double again and again (as laws that count only ready ones do)."""
    slow = Hardware(cold_start_s=120.0, max_replicas=20)
    report = simulate(OctavoLaw(ScalingPolicy(max_replicas=20)), workload.step(1.0, 10.0, 1_200.0, 3), slow)
    assert report.peak_replicas <= 10


def test_peers_follow_their_own_formulas() -> None:
    samples = tuple(ReplicaSample(f"r{i}", 0.0, waiting=10, running=20, kv_utilization=0.9) for i in range(2))
    signals = Signals(current=2, ready=2, samples=samples, held=5)
    assert keda_queue(5).decide(signals, 0.0) == 5
    assert hpa_kv(0.8).decide(signals, 0.0) == 3


def test_all_laws_run_and_have_names_of_their_own() -> None:
    arrivals = workload.steady(4.0, 120.0, 1)
    reports = [simulate(law, arrivals, FAST) for law in all_laws(FAST)]
    assert len({r.law for r in reports}) == len(reports) == 9
    assert all(1 <= r.peak_replicas <= FAST.max_replicas for r in reports)
