"""`spec.autoscaling`: bounds, signals and pace of the replicas."""

from __future__ import annotations

import enum
from typing import Annotated

from pydantic import Field

from octavo_operator.api.base import Part, Rule
from octavo_operator.api.quantity import PositiveDecimal

TimeOfDay = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", max_length=5)]


class ScalingMode(enum.StrEnum):
    """Who sets the number of replicas."""

    INTERNAL = "Internal"
    EXTERNAL = "External"


class MetricType(enum.StrEnum):
    """A signal that the number of replicas follows."""

    KV_CACHE_UTILIZATION = "KVCacheUtilization"
    QUEUE_DEPTH = "QueueDepth"
    CONCURRENCY = "Concurrency"
    TIME_TO_FIRST_TOKEN = "TimeToFirstToken"  # noqa: S105


class Metric(Part):
    """One signal and its target per replica. The number of replicas is the largest that any signal asks for."""

    rules = (
        Rule(
            "double(self.target) > 0.0",
            "target must be above 0",
            lambda m: float(m.target) > 0,
            field="target",
        ),
        Rule(
            "self.type != 'KVCacheUtilization' || double(self.target) <= 1.0",
            "the target of KVCacheUtilization is a fraction: at most 1",
            lambda m: m.type is not MetricType.KV_CACHE_UTILIZATION or float(m.target) <= 1,
            field="target",
        ),
    )

    type: MetricType
    """KVCacheUtilization (fraction of blocks that live requests use), QueueDepth (waiting requests per ready replica),
    Concurrency (running requests per replica) or TimeToFirstToken (95th percentile in seconds; only scales up)."""
    target: PositiveDecimal
    """Target per replica, as a string such as "0.75"."""


class ScaleToZero(Part):
    """When a service without requests gives back its last replica."""

    idle_seconds: Annotated[int, Field(ge=10, le=2_592_000)] = 900
    """Seconds without a request after which no replica is kept."""


class ColdStart(Part):
    """What happens to requests while no replica is ready."""

    max_held_requests: Annotated[int, Field(ge=0, le=100_000)] = 500
    """Most requests held in the gateway; more are answered 503 with Retry-After."""
    hold_timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """Longest time a request is held."""


class Weekday(enum.StrEnum):
    MON = "Mon"
    TUE = "Tue"
    WED = "Wed"
    THU = "Thu"
    FRI = "Fri"
    SAT = "Sat"
    SUN = "Sun"


class Schedule(Part):
    """Bounds that hold at certain times, for load that is known beforehand."""

    rules = (
        Rule(
            "has(self.minReplicas) || has(self.maxReplicas)",
            "give minReplicas, maxReplicas or both",
            lambda s: s.min_replicas is not None or s.max_replicas is not None,
        ),
        Rule(
            "!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
            "minReplicas must not exceed maxReplicas",
            lambda s: s.min_replicas is None or s.max_replicas is None or s.min_replicas <= s.max_replicas,
            field="minReplicas",
        ),
        Rule(
            "self.startTime != self.endTime",
            "endTime must differ from startTime",
            lambda s: s.start_time != s.end_time,
            field="endTime",
        ),
    )

    name: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    """Name of the schedule, shown with decisions it shaped."""
    days_of_week: Annotated[list[Weekday], Field(min_length=1, max_length=7, json_schema_extra={"x-list-type": "set"})]
    """Days on which it starts."""
    start_time: TimeOfDay
    """Local time at which it starts, HH:MM."""
    end_time: TimeOfDay
    """Local time at which it ends, HH:MM; the next day's when earlier than startTime."""
    timezone: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_+\-/]+$")] = "UTC"
    """IANA name of the time zone, such as Europe/Berlin."""
    min_replicas: Annotated[int, Field(ge=0, le=1_000)] | None = None
    """Least replicas while it holds."""
    max_replicas: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Most replicas while it holds."""


class PolicyType(enum.StrEnum):
    PODS = "Pods"
    PERCENT = "Percent"


class SelectPolicy(enum.StrEnum):
    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


class ScalingPolicy(Part):
    """One limit on the pace of change, as in autoscaling/v2."""

    type: PolicyType
    """Pods (an absolute number) or Percent (of the current number)."""
    value: Annotated[int, Field(ge=1, le=10_000)]
    """How much may change within the period."""
    period_seconds: Annotated[int, Field(ge=1, le=1_800)]
    """Length of the period."""


class ScalingRules(Part):
    """Pace of change in one direction, as in autoscaling/v2."""

    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3_600)] | None = None
    """Seconds of past recommendations considered; the most cautious of them is followed."""
    select_policy: SelectPolicy = SelectPolicy.MAX
    """Which policy counts when several are given; Disabled forbids this direction."""
    policies: Annotated[list[ScalingPolicy], Field(max_length=8)] | None = None
    """The limits."""
    tolerance: Annotated[str, Field(pattern=r"^0(\.[0-9]{1,4})?$")] | None = None
    """Relative deviation from the target that changes nothing."""


class Behavior(Part):
    """Pace of change, as in autoscaling/v2."""

    scale_up: ScalingRules | None = None
    """Pace of scaling up; by default at once, at most +100 % or +4 replicas a minute."""
    scale_down: ScalingRules | None = None
    """Pace of scaling down; by default the largest need of 300 s, one replica a minute."""


DEFAULT_METRICS = (
    Metric(type=MetricType.KV_CACHE_UTILIZATION, target="0.65"),
    Metric(type=MetricType.QUEUE_DEPTH, target="4"),
)


class Autoscaling(Part):
    """How the number of replicas follows the load."""

    rules = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas must not exceed maxReplicas",
            lambda a: a.min_replicas <= a.max_replicas,
            field="minReplicas",
        ),
        Rule(
            "self.minReplicas > 0 || has(self.scaleToZero)",
            "minReplicas 0 needs scaleToZero, which says when the last replica goes: add scaleToZero: {}",
            lambda a: a.min_replicas > 0 or a.scale_to_zero is not None,
            field="scaleToZero",
        ),
        Rule(
            "!has(self.scaleToZero) || self.minReplicas == 0",
            "scaleToZero needs minReplicas 0",
            lambda a: a.scale_to_zero is None or a.min_replicas == 0,
            field="minReplicas",
        ),
        Rule(
            None,
            "each metric type may appear once",
            lambda a: len({m.type for m in a.metrics}) == len(a.metrics),
            field="metrics",
        ),
        Rule(
            "self.mode != 'Internal' || "
            "self.metrics.exists(m, m.type in ['KVCacheUtilization', 'QueueDepth', 'Concurrency'])",
            "mode Internal needs a metric of load: KVCacheUtilization, QueueDepth or Concurrency",
            lambda a: (
                a.mode is not ScalingMode.INTERNAL
                or any(m.type is not MetricType.TIME_TO_FIRST_TOKEN for m in a.metrics)
            ),
            field="metrics",
        ),
        Rule(
            "self.schedules.all(s, (has(s.minReplicas) ? s.minReplicas : self.minReplicas) <= "
            "(has(s.maxReplicas) ? s.maxReplicas : self.maxReplicas))",
            "a schedule's bounds, filled up with the service's own, must have min <= max",
            lambda a: all(
                (a.min_replicas if s.min_replicas is None else s.min_replicas)
                <= (a.max_replicas if s.max_replicas is None else s.max_replicas)
                for s in a.schedules
            ),
            field="schedules",
        ),
    )

    mode: ScalingMode = ScalingMode.INTERNAL
    """Internal: Octavo's own loop decides. External: an HPA or KEDA sets spec.replicas through /scale."""
    min_replicas: Annotated[int, Field(ge=0, le=1_000)] = 1
    """Least replicas; 0 lets an idle service give back its last one."""
    max_replicas: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Most replicas."""
    metrics: Annotated[
        list[Metric], Field(min_length=1, max_length=4, json_schema_extra={"x-list-map-keys": ["type"]})
    ] = list(DEFAULT_METRICS)
    """Signals and their targets; the number of replicas is the largest that any of them asks for."""
    scale_to_zero: ScaleToZero | None = None
    """When the last replica goes. Needs minReplicas 0."""
    cold_start: ColdStart = ColdStart()
    """What happens to requests while no replica is ready."""
    schedules: Annotated[list[Schedule], Field(max_length=16, json_schema_extra={"x-list-map-keys": ["name"]})] = []
    """Bounds that hold at certain times."""
    behavior: Behavior = Behavior()
    """Pace of change, as in autoscaling/v2."""
