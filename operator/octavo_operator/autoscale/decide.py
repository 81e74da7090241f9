"""decide(signals, policy, history, now) -> Decision: how many replicas, why, and what to remember. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from octavo_operator.autoscale.demand import Demand, demand, from_zero
from octavo_operator.autoscale.history import Change, History, Recommendation
from octavo_operator.autoscale.pace import limit_down, limit_up, stabilized_down, stabilized_up, within_tolerance
from octavo_operator.autoscale.policy import Owner, ScalingPolicy
from octavo_operator.autoscale.schedule import bounds_at
from octavo_operator.autoscale.signals import ReplicaSample, Signals, total

BREACHES_TO_ACT = 2
SLOW_WINDOWS_TO_ACT = 2
MEMORY_S = 3_600.0  # the longest window a policy may name


class Reason(enum.StrEnum):
    """What decided."""

    KV_CACHE_UTILIZATION = "KVCacheUtilization"
    CONCURRENCY = "Concurrency"
    OFFERED_LOAD = "OfferedLoad"
    QUEUE_DEPTH = "QueueDepth"
    TIME_TO_FIRST_TOKEN = "TimeToFirstToken"  # noqa: S105
    HELD_REQUESTS = "HeldRequests"
    IDLE = "Idle"
    BOUNDS = "Bounds"
    STEADY = "Steady"
    METRICS_STALE = "MetricsStale"
    FIXED = "Fixed"


class Guard(enum.StrEnum):
    """What kept the result from being what the signals asked for."""

    NONE = ""
    MAX_REPLICAS = "MaxReplicas"
    MIN_REPLICAS = "MinReplicas"
    SCALE_UP_POLICY = "ScaleUpPolicy"
    SCALE_DOWN_POLICY = "ScaleDownPolicy"
    STABILIZATION = "Stabilization"
    TOLERANCE = "Tolerance"
    PENDING_REPLICAS = "PendingReplicas"
    UNSCHEDULABLE = "Unschedulable"
    STALE_METRICS = "StaleMetrics"
    ROLLOUT = "Rollout"
    RESTART = "OperatorRestart"
    NOT_IDLE_YET = "NotIdleYet"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer with all its inputs. `history` is what to pass to the next call."""

    replicas: int
    reason: Reason
    guard: Guard
    message: str
    history: History
    waiting: float = 0.0
    held: int = 0
    running: float = 0.0
    kv_utilization: float | None = None  # mean of the ready replicas with fresh metrics
    replicas_worth: float = 0.0
    kv_desired: int | None = None
    concurrency_desired: int | None = None
    load_desired: int | None = None
    queue_desired: int | None = None
    slo_desired: int | None = None
    ready: int = 0
    pending: int = 0
    stale: int = 0
    schedule: str = ""

    @property
    def frozen(self) -> bool:
        """Whether too few metrics were there to decide."""
        return self.reason is Reason.METRICS_STALE


@dataclass(frozen=True, slots=True)
class _Outcome:
    replicas: int
    reason: Reason
    guard: Guard = Guard.NONE


def decide(signals: Signals, policy: ScalingPolicy, history: History, now: float) -> Decision:
    """The number of replicas for what is seen. `now` is Unix seconds; calling again changes nothing by itself."""
    fresh = signals.fresh(now, policy.stale_after_s)
    stale = max(0, signals.ready - len(fresh))
    learned = history.learn(signals, fresh, policy, now)
    load = demand(signals, fresh, learned, policy, stale)
    least, most, schedule = bounds_at(policy, now)
    queue, slo = _guards(signals, learned)
    if policy.owner is not Owner.OCTAVO:
        outcome, wanted = _Outcome(policy.min_replicas, Reason.FIXED), policy.min_replicas
    elif signals.ready and 2 * len(fresh) < signals.ready:
        kept = min(max(signals.current, least), most)
        outcome, wanted = _Outcome(kept, Reason.METRICS_STALE, Guard.STALE_METRICS), signals.current
    else:
        outcome, wanted = _scale(signals, policy, learned, load, (queue, slo), (least, most), stale, now)
    history = _remember(learned, signals, outcome, wanted, now)
    return _decision(signals, policy, fresh, stale, load, (queue, slo), outcome, schedule, history)


def _scale(
    signals: Signals,
    policy: ScalingPolicy,
    history: History,
    load: Demand,
    guards: tuple[int | None, int | None],
    bounds: tuple[int, int],
    stale: int,
    now: float,
) -> tuple[_Outcome, int]:
    """The outcome, and the recommendation to remember for the stabilization windows."""
    least, most = bounds
    current = signals.current
    wanted, reason = _wanted_up(signals, policy, history, load, guards)
    if wanted > current:
        recommended = min(max(wanted, least), most)
        return _up(signals, policy, history, wanted, reason, bounds, now), recommended
    idle = _is_idle(signals, policy, history, now)
    floor = 1 if current else 0
    recommended = min(max(least, 0 if idle else max(load.down, floor, *(g or 0 for g in guards))), most)
    if current < least:
        return _Outcome(least, Reason.BOUNDS, Guard.MIN_REPLICAS), recommended
    if current > most:
        return _Outcome(most, Reason.BOUNDS, Guard.MAX_REPLICAS), recommended
    if recommended >= current:
        return _Outcome(current, reason if wanted == current and wanted else Reason.STEADY), recommended
    return _down(signals, policy, history, recommended, idle, stale, now), recommended


def _wanted_up(
    signals: Signals, policy: ScalingPolicy, history: History, load: Demand, guards: tuple[int | None, int | None]
) -> tuple[int, Reason]:
    queue, slo = guards
    if not signals.current and not signals.held and not history.arrived:
        return 0, Reason.STEADY  # asleep: an arrival rate of the past wakes nobody
    asked: list[tuple[int, Reason]] = [
        (load.kv or 0, Reason.KV_CACHE_UTILIZATION),
        (load.concurrency or 0, Reason.CONCURRENCY),
        (load.load or 0, Reason.OFFERED_LOAD),
        (queue or 0, Reason.QUEUE_DEPTH),
        (slo or 0, Reason.TIME_TO_FIRST_TOKEN),
    ]
    if not signals.ready:
        asked.append((from_zero(signals, history, policy), Reason.HELD_REQUESTS))
        asked[2] = (0, Reason.OFFERED_LOAD)  # nothing serves yet: the held requests are the load
    return max(asked, key=lambda entry: entry[0])


def _up(
    signals: Signals,
    policy: ScalingPolicy,
    history: History,
    wanted: int,
    reason: Reason,
    bounds: tuple[int, int],
    now: float,
) -> _Outcome:
    least, most = bounds
    current = signals.current
    bounded = min(max(wanted, least), most)
    guard = Guard.MAX_REPLICAS if bounded < wanted else Guard.NONE
    if bounded <= current:
        return _Outcome(bounded, reason if bounded == current else Reason.BOUNDS, Guard.MAX_REPLICAS)
    if signals.unschedulable:
        return _Outcome(max(current, least), reason, Guard.UNSCHEDULABLE)
    if within_tolerance(current, bounded, policy.up.tolerance):
        return _Outcome(current, reason, Guard.TOLERANCE)
    steady = max(stabilized_up(bounded, history.recommendations, policy.up, now), current)
    paced = max(limit_up(current, steady, history.changes, policy.up, now), least)
    if steady < bounded:
        guard = Guard.STABILIZATION
    if paced < steady:
        guard = Guard.SCALE_UP_POLICY
    return _Outcome(paced, reason, guard)


def _down(
    signals: Signals,
    policy: ScalingPolicy,
    history: History,
    recommended: int,
    idle: bool,
    stale: int,
    now: float,
) -> _Outcome:
    current = signals.current
    reason = Reason.IDLE if recommended == 0 else Reason.STEADY
    blocked = _down_blocked(signals, policy, history, stale, now)
    if blocked is not Guard.NONE:
        return _Outcome(current, Reason.STEADY, blocked)
    if idle and recommended == 0:
        return _Outcome(0, Reason.IDLE)  # idleSeconds is a longer window than any other
    if within_tolerance(current, recommended, policy.down.tolerance):
        return _Outcome(current, Reason.STEADY, Guard.TOLERANCE)
    steady = min(stabilized_down(recommended, history.recommendations, policy.down, now), current)
    if steady == current:
        return _Outcome(current, Reason.STEADY, Guard.STABILIZATION)
    paced = limit_down(current, steady, history.changes, policy.down, now)
    guard = Guard.SCALE_DOWN_POLICY if paced > steady else Guard.NONE
    down_reason = Reason.KV_CACHE_UTILIZATION if policy.kv_target is not None else Reason.CONCURRENCY
    return _Outcome(paced, down_reason if paced < current else reason, guard)


def _down_blocked(signals: Signals, policy: ScalingPolicy, history: History, stale: int, now: float) -> Guard:
    """What forbids scaling down at all: doubt about the load, or replicas that are not there yet."""
    if signals.pending:
        return Guard.PENDING_REPLICAS
    if stale:
        return Guard.STALE_METRICS
    if signals.changing or history.slow_windows >= SLOW_WINDOWS_TO_ACT:
        return Guard.ROLLOUT if signals.changing else Guard.STABILIZATION
    if now - history.started_at < policy.down.stabilization_s:
        return Guard.RESTART
    return Guard.NONE


def _is_idle(signals: Signals, policy: ScalingPolicy, history: History, now: float) -> bool:
    """Whether the last replica may go: allowed to, nobody waits or runs, and no request came for long enough."""
    if policy.idle_s is None or signals.held or history.last_active is None:
        return False
    return now - history.last_active >= policy.idle_s


def _guards(signals: Signals, history: History) -> tuple[int | None, int | None]:
    """(queue guard, time-to-first-token guard): one more than there are, but only when none is on its way."""
    if signals.pending or not signals.ready:
        return None, None
    one_more = signals.ready + 1
    queue = one_more if history.queue_breaches >= BREACHES_TO_ACT else None
    slo = one_more if history.slow_windows >= SLOW_WINDOWS_TO_ACT else None
    return queue, slo


def _remember(history: History, signals: Signals, outcome: _Outcome, wanted: int, now: float) -> History:
    recommendations = tuple(r for r in history.recommendations if now - r.time <= MEMORY_S)
    if not recommendations or recommendations[-1].replicas != wanted or now - recommendations[-1].time >= 1.0:
        recommendations = (*recommendations, Recommendation(now, wanted))
    changes = tuple(c for c in history.changes if now - c.time <= MEMORY_S)
    delta = outcome.replicas - signals.current
    if delta:
        changes = (*changes, Change(now, delta))
    slow = 0 if delta > 0 else history.slow_windows
    breaches = 0 if delta > 0 else history.queue_breaches
    return replace(
        history, recommendations=recommendations, changes=changes, slow_windows=slow, queue_breaches=breaches
    )


def _decision(
    signals: Signals,
    policy: ScalingPolicy,
    fresh: tuple[ReplicaSample, ...],
    stale: int,
    load: Demand,
    guards: tuple[int | None, int | None],
    outcome: _Outcome,
    schedule: str,
    history: History,
) -> Decision:
    uses = [s.kv_utilization for s in fresh if s.kv_utilization is not None]
    queue, slo = guards
    decision = Decision(
        replicas=outcome.replicas,
        reason=outcome.reason,
        guard=outcome.guard,
        message="",
        history=history,
        waiting=total(s.waiting for s in fresh),
        held=signals.held,
        running=total(s.running for s in fresh),
        kv_utilization=sum(uses) / len(uses) if uses else None,
        replicas_worth=load.replicas_worth,
        kv_desired=load.kv,
        concurrency_desired=load.concurrency,
        load_desired=load.load,
        queue_desired=queue,
        slo_desired=slo,
        ready=signals.ready,
        pending=signals.pending,
        stale=stale,
        schedule=schedule,
    )
    return replace(decision, message=_message(signals, policy, decision))


def _message(signals: Signals, policy: ScalingPolicy, decision: Decision) -> str:
    """What changed and why: every signal beside its target, and the guard that changed the result."""
    current = signals.current
    change = f"{current} to {decision.replicas}" if decision.replicas != current else f"{current}"
    counts = f"{decision.ready} ready" + (f", {decision.pending} pending" if decision.pending else "")
    seen = [f"{decision.waiting:.0f} waiting + {decision.held} held" + _target(policy.queue_target, " a replica")]
    seen.append(f"{decision.running:.0f} running" + _target(policy.concurrency_target, " a replica"))
    if decision.kv_utilization is not None:
        kv_target = None if policy.kv_target is None else 100 * policy.kv_target
        seen.append(f"KV {decision.kv_utilization:.0%}" + _target(kv_target, "%"))
    if signals.ttft is not None and policy.ttft_target_s is not None:
        seen.append(f"first token p95 {signals.ttft.p95_s:.2g} s" + _target(policy.ttft_target_s, " s"))
    guard = f"; {decision.guard.value} limits" if decision.guard is not Guard.NONE else ""
    return f"{change} replicas ({counts}): {decision.reason.value}: {', '.join(seen)}{guard}"


def _target(value: float | None, unit: str) -> str:
    return "" if value is None else f" (target {value:g}{unit})"
