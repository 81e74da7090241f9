from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_operator.api.autoscaling import SelectPolicy
from octavo_operator.autoscale.decide import Decision, Guard, Reason, decide
from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.policy import Owner, Pace, PaceLimit, ScalingPolicy, ScheduleBounds
from octavo_operator.autoscale.schedule import bounds_at, holds
from octavo_operator.autoscale.signals import ReplicaSample, Signals, Ttft

ONE_A_MINUTE = Pace(300.0, (PaceLimit(False, 1, 60.0),))
POLICY = ScalingPolicy(min_replicas=1, max_replicas=10, kv_target=0.75, down=ONE_A_MINUTE)
ZERO = ScalingPolicy(min_replicas=0, max_replicas=10, idle_s=900.0)
UNLIMITED = Pace(0.0, ())


def samples(count: int, now: float, *, waiting: float = 0, running: float = 0, kv: float | None = 0.0) -> Signals:
    """`count` ready replicas, each with these numbers."""
    ready = tuple(
        ReplicaSample(f"r{i}", now, waiting=waiting, running=running, kv_utilization=kv) for i in range(count)
    )
    return Signals(current=count, ready=count, samples=ready)


def long_running(kbar: float = 0.02, now: float = 10_000.0) -> History:
    """A history that began long ago, so that nothing is held back for want of knowledge."""
    return History(started_at=now - 10_000.0, kbar=kbar, last_active=now)


def run(
    signals: Signals, policy: ScalingPolicy = POLICY, history: History | None = None, now: float = 10_000.0
) -> Decision:
    return decide(signals, policy, history or long_running(now=now), now)


def test_kv_demand_sets_the_number() -> None:
    decision = run(samples(2, 10_000.0, running=40, kv=0.9))
    assert decision.kv_desired == 3
    assert (decision.replicas, decision.reason) == (3, Reason.KV_CACHE_UTILIZATION)


def test_nothing_changes_at_the_target() -> None:
    decision = run(samples(3, 10_000.0, running=30, kv=0.74))
    assert (decision.replicas, decision.guard) == (3, Guard.NONE)


def test_a_backlog_counts_only_up_to_the_queue_target() -> None:
    calm = run(samples(1, 10_000.0, running=10, waiting=4, kv=0.5))
    flooded = run(samples(1, 10_000.0, running=10, waiting=400, kv=0.5))
    assert calm.kv_desired == flooded.kv_desired


def test_a_backlog_is_drained_within_the_horizon_once_service_time_is_known() -> None:
    history = replace(long_running(kbar=0.05), service_s=10.0)
    decision = run(samples(4, 10_000.0, running=10, waiting=25, kv=0.5), history=history)
    # excess 84 over 60 s = 1.4/s; 0.05 * 10 * 1.4 / 0.75 -> 1
    assert decision.load_desired == 1


def test_offered_load_asks_for_what_arrivals_will_need() -> None:
    history = replace(long_running(kbar=0.05), service_s=20.0, arrival_rate=4.0, arrivals=100.0, arrivals_at=9_995.0)
    signals = replace(samples(2, 10_000.0, running=10, kv=0.5), arrivals=120.0)
    decision = run(signals, history=history)
    assert decision.load_desired == 6  # 0.05 * 20 * 4 = 4 caches; / 0.75; at most 3 times what there is
    assert (decision.replicas, decision.reason) == (6, Reason.OFFERED_LOAD)


def test_the_queue_guard_acts_after_two_breaches_and_not_while_a_replica_is_on_its_way() -> None:
    flooded = samples(2, 10_000.0, running=2, waiting=10, kv=0.1)
    first = run(flooded)
    assert first.queue_desired is None
    second = decide(replace(flooded), POLICY, first.history, 10_005.0)
    assert (second.replicas, second.reason) == (3, Reason.QUEUE_DEPTH)
    pending = decide(replace(flooded, current=3, pending=1), POLICY, first.history, 10_005.0)
    assert pending.replicas == 3


def test_the_latency_guard_needs_two_slow_windows_with_enough_samples() -> None:
    policy = replace(POLICY, ttft_target_s=2.0)
    history = long_running()
    calm = samples(2, 10_000.0, running=2, kv=0.1)
    outcomes = []
    for window, count in ((100.0, 60), (220.0, 10), (340.0, 60), (460.0, 60)):
        decision = decide(replace(calm, ttft=Ttft(window, 5.0, count)), policy, history, 10_000.0)
        history = decision.history
        outcomes.append(decision.slo_desired)
    assert outcomes == [None, None, None, 3]


def test_loading_replicas_count_as_capacity_to_come() -> None:
    signals = replace(samples(2, 10_000.0, running=40, kv=1.0), current=3, pending=1)
    assert run(signals).replicas == 3


def test_no_replica_is_added_while_one_cannot_be_scheduled() -> None:
    signals = replace(samples(2, 10_000.0, running=80, kv=1.0), current=2, unschedulable=1)
    decision = run(signals)
    assert (decision.replicas, decision.guard) == (2, Guard.UNSCHEDULABLE)


def test_scaling_up_is_limited_per_minute() -> None:
    history = replace(long_running(), service_s=100.0)
    signals = replace(samples(6, 10_000.0, running=60, waiting=300, kv=1.0), held=100_000)
    policy = replace(POLICY, max_replicas=100)
    decision = run(signals, policy, history)
    assert (decision.replicas, decision.guard) == (12, Guard.SCALE_UP_POLICY)
    again = decide(replace(signals, current=12, pending=6), policy, decision.history, 10_005.0)
    assert again.replicas == 12


def test_scaling_down_follows_the_largest_need_of_the_window_one_at_a_time() -> None:
    history = long_running()
    busy = decide(samples(4, 10_000.0, running=40, kv=0.7), POLICY, history, 10_000.0)
    idle = decide(samples(4, 10_200.0), POLICY, busy.history, 10_200.0)
    assert (idle.replicas, idle.guard) == (4, Guard.STABILIZATION)
    later = decide(samples(4, 10_301.0), POLICY, idle.history, 10_301.0)
    assert (later.replicas, later.guard) == (3, Guard.SCALE_DOWN_POLICY)
    soon = decide(samples(3, 10_330.0), POLICY, later.history, 10_330.0)
    assert soon.replicas == 3
    assert decide(samples(3, 10_362.0), POLICY, soon.history, 10_362.0).replicas == 2


@pytest.mark.parametrize(
    ("change", "guard"),
    [
        ({"pending": 1}, Guard.PENDING_REPLICAS),
        ({"changing": True}, Guard.ROLLOUT),
        ({"ready": 5, "current": 5}, Guard.STALE_METRICS),
    ],
)
def test_doubt_forbids_scaling_down(change: dict[str, int], guard: Guard) -> None:
    signals = replace(samples(4, 10_000.0), **change)  # type: ignore[arg-type]
    decision = run(signals)
    assert (decision.replicas, decision.guard) == (signals.current, guard)


def test_nothing_is_scaled_down_right_after_the_operator_started() -> None:
    decision = run(samples(4, 10_000.0), history=History(started_at=9_900.0))
    assert (decision.replicas, decision.guard) == (4, Guard.RESTART)


def test_too_few_fresh_metrics_freeze_the_number() -> None:
    signals = replace(samples(1, 10_000.0, running=50, kv=1.0), ready=4, current=4)
    decision = run(signals)
    assert (decision.replicas, decision.reason, decision.frozen) == (4, Reason.METRICS_STALE, True)


def test_old_samples_are_stale() -> None:
    decision = run(samples(2, 9_900.0, running=50, kv=1.0))
    assert decision.frozen
    assert decision.stale == 2


def test_the_last_replica_goes_after_the_idle_time_only() -> None:
    quiet = samples(1, 10_000.0)
    assert run(quiet, ZERO, replace(long_running(), last_active=9_200.0)).replicas == 1
    decision = run(quiet, ZERO, replace(long_running(), last_active=9_000.0))
    assert (decision.replicas, decision.reason) == (0, Reason.IDLE)


def test_a_running_request_keeps_the_last_replica() -> None:
    busy = samples(1, 10_000.0, running=1, kv=0.01)
    assert run(busy, ZERO, replace(long_running(), last_active=1.0)).replicas == 1


def test_a_loading_replica_is_never_taken_away_for_idleness() -> None:
    signals = Signals(current=1, ready=0, pending=1)
    assert run(signals, ZERO, replace(long_running(), last_active=1.0)).replicas == 1


def test_held_requests_wake_as_many_as_they_need() -> None:
    asleep = Signals(current=0, ready=0, held=1)
    assert run(asleep, ZERO).replicas == 1
    decision = run(replace(asleep, held=120), ZERO, long_running(kbar=0.02))
    assert (decision.replicas, decision.reason) == (4, Reason.HELD_REQUESTS)


def test_a_request_that_came_and_went_between_two_looks_wakes_one() -> None:
    history = replace(long_running(), arrivals=5.0, arrivals_at=9_995.0)
    assert run(Signals(current=0, ready=0, arrivals=6.0), ZERO, history).replicas == 1


def test_an_idle_service_stays_asleep_whatever_it_remembers() -> None:
    history = replace(long_running(), arrival_rate=5.0, service_s=30.0, arrivals=5.0, arrivals_at=9_995.0)
    assert run(Signals(current=0, ready=0, arrivals=5.0), ZERO, history).replicas == 0


def test_engines_without_a_kv_signal_scale_on_concurrency() -> None:
    policy = replace(POLICY, kv_target=None, concurrency_target=10.0)
    decision = run(samples(2, 10_000.0, running=18, kv=None), policy)
    assert (decision.replicas, decision.reason) == (4, Reason.CONCURRENCY)


def test_exact_queued_tokens_replace_the_estimate() -> None:
    sample = ReplicaSample(
        "r", 10_000.0, waiting=2, running=10, kv_utilization=0.5, kv_capacity_tokens=1000.0, queued_kv_tokens=900.0
    )
    decision = run(Signals(current=1, ready=1, samples=(sample,)))
    assert decision.replicas_worth == pytest.approx(0.5 + 0.9)


@pytest.mark.parametrize("owner", [Owner.FIXED, Owner.EXTERNAL])
def test_a_number_set_elsewhere_is_left_alone(owner: Owner) -> None:
    policy = ScalingPolicy(min_replicas=3, max_replicas=3, owner=owner)
    decision = run(samples(3, 10_000.0, running=100, kv=1.0), policy)
    assert (decision.replicas, decision.reason) == (3, Reason.FIXED)


def test_a_disabled_direction_never_moves() -> None:
    policy = replace(POLICY, up=replace(UNLIMITED, select=SelectPolicy.DISABLED))
    assert run(samples(2, 10_000.0, running=50, kv=1.0), policy).replicas == 2


def test_a_short_peak_does_not_scale_up_within_its_window() -> None:
    policy = replace(POLICY, up=replace(POLICY.up, stabilization_s=30.0))
    history = long_running()
    calm = decide(samples(2, 10_000.0, running=2, kv=0.1), policy, history, 10_000.0)
    peak = decide(samples(2, 10_010.0, running=50, kv=1.0), policy, calm.history, 10_010.0)
    assert (peak.replicas, peak.guard) == (2, Guard.STABILIZATION)
    lasting = decide(samples(2, 10_041.0, running=50, kv=1.0), policy, peak.history, 10_041.0)
    assert lasting.replicas == 3


def test_tolerance_ignores_small_deviations() -> None:
    policy = replace(POLICY, up=replace(POLICY.up, tolerance=0.5))
    assert run(samples(3, 10_000.0, running=40, kv=0.8), policy).guard is Guard.TOLERANCE


def test_schedules_raise_the_bounds_in_their_time_zone_and_across_midnight() -> None:
    night = ScheduleBounds("night", frozenset({4}), 22 * 60, 6 * 60, "Europe/Berlin", 3, None)
    policy = replace(POLICY, schedules=(night,))
    friday_23 = dt.datetime(2026, 11, 20, 22, 0, tzinfo=dt.UTC).timestamp()  # 23:00 in Berlin
    saturday_5 = dt.datetime(2026, 11, 21, 4, 0, tzinfo=dt.UTC).timestamp()
    saturday_23 = dt.datetime(2026, 11, 21, 22, 0, tzinfo=dt.UTC).timestamp()
    assert [holds(night, t) for t in (friday_23, saturday_5, saturday_23)] == [True, True, False]
    assert bounds_at(policy, friday_23) == (3, 10, "night")
    decision = decide(samples(1, friday_23), policy, long_running(now=friday_23), friday_23)
    assert (decision.replicas, decision.schedule) == (3, "night")


def test_estimates_survive_a_restart_and_nonsense_does_not() -> None:
    history = replace(long_running(), service_s=12.5, capacity_tokens=60_000.0)
    restored = History.restore(history.persisted(), 5.0)
    assert (restored.kbar, restored.service_s, restored.capacity_tokens) == (0.02, 12.5, 60_000.0)
    broken = History.restore({"kbar": "nan", "serviceSeconds": "-1", "kvCapacityTokens": "x"}, 5.0)
    assert (broken.kbar, broken.service_s, broken.capacity_tokens) == (None, None, None)


def test_the_message_names_what_was_seen_each_target_and_what_limited_it() -> None:
    decision = run(replace(samples(2, 10_000.0, running=40, kv=1.0), held=3), replace(POLICY, max_replicas=2))
    assert decision.message == (
        "2 replicas (2 ready): KVCacheUtilization: 0 waiting + 3 held (target 4 a replica), 80 running, "
        "KV 100% (target 75%); MaxReplicas limits"
    )


numbers = st.floats(0, 200)
replica = st.builds(
    ReplicaSample,
    name=st.just("r"),
    sampled_at=st.sampled_from([9_000.0, 9_990.0, 10_000.0]),
    waiting=numbers,
    running=numbers,
    kv_utilization=st.none() | st.floats(0, 1),
    kv_capacity_tokens=st.none() | st.floats(1, 1e6),
    queued_kv_tokens=st.none() | st.floats(0, 1e7),
)
signals_ = st.builds(
    Signals,
    current=st.integers(0, 20),
    ready=st.integers(0, 8),
    samples=st.lists(replica, max_size=8).map(tuple),
    pending=st.integers(0, 3),
    unschedulable=st.integers(0, 1),
    held=st.integers(0, 500),
    arrivals=st.none() | st.floats(0, 1e6),
    service_s=st.none() | st.floats(0.01, 300),
    changing=st.booleans(),
)
policies = st.builds(
    lambda low, span, zero, kv, pace: ScalingPolicy(
        min_replicas=0 if zero else low,
        max_replicas=max(1, low + span),
        idle_s=60.0 if zero else None,
        kv_target=kv,
        concurrency_target=None if kv else 5.0,
        up=pace,
    ),
    st.integers(1, 5),
    st.integers(0, 15),
    st.booleans(),
    st.none() | st.floats(0.1, 1),
    st.sampled_from([POLICY.up, UNLIMITED, Pace(30.0, (PaceLimit(True, 50, 15.0),), SelectPolicy.MIN)]),
)


@settings(max_examples=150, deadline=None)
@given(signals_, policies)
def test_the_result_always_lies_within_the_bounds(signals: Signals, policy: ScalingPolicy) -> None:
    decision = decide(signals, policy, long_running(), 10_000.0)
    assert policy.min_replicas <= decision.replicas <= policy.max_replicas or (
        decision.guard is Guard.UNSCHEDULABLE and decision.replicas == signals.current
    )


@settings(max_examples=100, deadline=None)
@given(signals_, policies)
def test_missing_metrics_never_scale_down(signals: Signals, policy: ScalingPolicy) -> None:
    blind = replace(signals, samples=(), ready=max(signals.ready, 1))
    decision = decide(blind, policy, long_running(), 10_000.0)
    assert decision.replicas >= min(signals.current, policy.max_replicas)


@settings(max_examples=100, deadline=None)
@given(signals_, policies, st.integers(1, 200))
def test_more_held_requests_never_ask_for_fewer(signals: Signals, policy: ScalingPolicy, more: int) -> None:
    history = long_running()
    fewer = decide(signals, policy, history, 10_000.0)
    greater = decide(replace(signals, held=signals.held + more), policy, history, 10_000.0)
    assert greater.replicas >= fewer.replicas


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 6), st.integers(1, 6))
def test_a_constant_load_settles_without_flapping(load: float, start: int) -> None:
    """Replicas share a constant demand of `load` caches; after an hour the number stands still, and it suffices."""
    history, current, seen = History(started_at=-10_000.0, kbar=0.02), start, []
    for step in range(1, 700):
        now = step * 5.0
        kv = min(1.0, load / current)
        decision = decide(samples(current, now, running=kv * 50, kv=kv), POLICY, history, now)
        history, current = decision.history, decision.replicas
        seen.append(current)
    assert len(set(seen[-100:])) == 1
    assert load / current <= 0.75 + 1e-6 or current == POLICY.max_replicas
