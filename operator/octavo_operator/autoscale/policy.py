"""What a service's owner wants of the autoscaler, as plain numbers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from octavo_operator.api.autoscaling import Autoscaling, MetricType, ScalingMode, ScalingRules, SelectPolicy, Weekday
from octavo_operator.api.inference_service import InferenceServiceSpec

DEFAULT_MAX_NUM_SEQS = 128


class Owner(enum.StrEnum):
    """Who sets the number of replicas."""

    OCTAVO = "Octavo"  # the law of this package
    EXTERNAL = "External"  # an HPA or KEDA through /scale
    FIXED = "Fixed"  # a number in the manifest


@dataclass(frozen=True, slots=True)
class PaceLimit:
    """At most `value` replicas, or `value` percent, within `period_s` seconds."""

    percent: bool
    value: int
    period_s: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the number may change in one direction, as in autoscaling/v2."""

    stabilization_s: float
    limits: tuple[PaceLimit, ...]
    select: SelectPolicy = SelectPolicy.MAX
    tolerance: float = 0.0


SCALE_UP = Pace(0.0, (PaceLimit(True, 100, 60.0), PaceLimit(False, 4, 60.0)))
SCALE_DOWN = Pace(300.0, (PaceLimit(True, 50, 60.0), PaceLimit(False, 1, 60.0)))


@dataclass(frozen=True, slots=True)
class ScheduleBounds:
    """Bounds between two times of day; `start_minute` and `end_minute` count from local midnight."""

    name: str
    days: frozenset[int]  # 0 is Monday
    start_minute: int
    end_minute: int
    timezone: str
    min_replicas: int | None
    max_replicas: int | None


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Bounds, targets and pace. Targets of None switch their signal off; times are seconds."""

    min_replicas: int = 1
    max_replicas: int = 1
    owner: Owner = Owner.OCTAVO
    kv_target: float | None = 0.65  # the knee: above it waits grow, below it cost does (benchmarks/autoscaler.py)
    queue_target: float | None = 4.0  # waiting requests per ready replica
    concurrency_target: float | None = None  # running requests per replica
    ttft_target_s: float | None = None
    idle_s: float | None = None  # None keeps the last replica
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    drain_horizon_s: float = 60.0  # a backlog is to be gone after this time
    down_ratio: float = 0.75  # scale down against a lower target than up, so that the two do not alternate
    up: Pace = SCALE_UP
    down: Pace = SCALE_DOWN
    schedules: tuple[ScheduleBounds, ...] = ()
    look_ahead: bool = False
    stale_after_s: float = 15.0

    @property
    def scales(self) -> bool:
        """Whether this package decides, rather than the manifest or another autoscaler."""
        return self.owner is Owner.OCTAVO


def policy_of(spec: InferenceServiceSpec) -> ScalingPolicy:
    """The policy that a service's spec asks for."""
    max_num_seqs = spec.engine.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    fixed = spec.replicas if spec.replicas is not None else 1
    if spec.suspend:
        return ScalingPolicy(min_replicas=0, max_replicas=0, owner=Owner.FIXED, max_num_seqs=max_num_seqs)
    autoscaling = spec.autoscaling
    if autoscaling is None:
        return ScalingPolicy(min_replicas=fixed, max_replicas=fixed, owner=Owner.FIXED, max_num_seqs=max_num_seqs)
    if autoscaling.mode is ScalingMode.EXTERNAL:
        return ScalingPolicy(min_replicas=fixed, max_replicas=fixed, owner=Owner.EXTERNAL, max_num_seqs=max_num_seqs)
    return _internal(autoscaling, max_num_seqs)


def _internal(autoscaling: Autoscaling, max_num_seqs: int) -> ScalingPolicy:
    targets = {metric.type: float(metric.target) for metric in autoscaling.metrics}
    return ScalingPolicy(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas,
        kv_target=targets.get(MetricType.KV_CACHE_UTILIZATION),
        queue_target=targets.get(MetricType.QUEUE_DEPTH),
        concurrency_target=targets.get(MetricType.CONCURRENCY),
        ttft_target_s=targets.get(MetricType.TIME_TO_FIRST_TOKEN),
        idle_s=float(autoscaling.scale_to_zero.idle_seconds) if autoscaling.scale_to_zero else None,
        max_num_seqs=max_num_seqs,
        up=_pace(autoscaling.behavior.scale_up, SCALE_UP),
        down=_pace(autoscaling.behavior.scale_down, SCALE_DOWN),
        schedules=tuple(
            ScheduleBounds(
                name=schedule.name,
                days=frozenset(_weekday(day) for day in schedule.days_of_week),
                start_minute=_minute(schedule.start_time),
                end_minute=_minute(schedule.end_time),
                timezone=schedule.timezone,
                min_replicas=schedule.min_replicas,
                max_replicas=schedule.max_replicas,
            )
            for schedule in autoscaling.schedules
        ),
    )


def _pace(rules: ScalingRules | None, default: Pace) -> Pace:
    if rules is None:
        return default
    window = rules.stabilization_window_seconds
    limits = default.limits
    if rules.policies is not None:
        limits = tuple(PaceLimit(p.type == "Percent", p.value, float(p.period_seconds)) for p in rules.policies)
    return Pace(
        stabilization_s=default.stabilization_s if window is None else float(window),
        limits=limits,
        select=rules.select_policy,
        tolerance=float(rules.tolerance or default.tolerance),
    )


def _weekday(day: Weekday) -> int:
    order: Sequence[Weekday] = tuple(Weekday)
    return order.index(day)


def _minute(time_of_day: str) -> int:
    hours, minutes = time_of_day.split(":")
    return int(hours) * 60 + int(minutes)
