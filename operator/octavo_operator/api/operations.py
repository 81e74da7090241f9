"""`spec.rollout`, `drain`, `routing`, `scheduling`, `observability`: how a service lives on a cluster."""

from __future__ import annotations

import enum
from typing import Annotated, Any

from pydantic import Field

from octavo_operator.api.base import Part, Rule
from octavo_operator.api.kubernetes import DnsName, Labels, Toleration
from octavo_operator.api.quantity import Fraction, PositiveDecimal, Quantity

AnyObject = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


class CanaryStep(Part):
    """One step of a canary: so much traffic for so long."""

    weight: Annotated[int, Field(ge=1, le=99)]
    """Percent of requests that the new revision gets."""
    pause_seconds: Annotated[int, Field(ge=1, le=604_800)]
    """How long the step lasts before the next."""


class CanaryAnalysis(Part):
    """What a new revision must achieve, compared with the old one."""

    max_error_rate: Fraction = "0.01"
    """Largest share of failed requests."""
    max_ttft_ratio: Annotated[PositiveDecimal, Field(alias="maxTTFTRatio")] = "1.2"
    """Largest ratio of the median times to first token, new to old."""


class Canary(Part):
    """A new revision gets traffic step by step."""

    rules = (
        Rule(
            "self.steps.map(s, s.weight).isSorted() && "
            "self.steps.all(a, self.steps.exists_one(b, a.weight == b.weight))",
            "weights must increase from step to step",
            lambda c: all(a.weight < b.weight for a, b in zip(c.steps, c.steps[1:], strict=False)),
            field="steps",
        ),
    )

    steps: Annotated[list[CanaryStep], Field(min_length=1, max_length=10)]
    """The steps; after the last one the new revision gets all traffic."""
    analysis: CanaryAnalysis = CanaryAnalysis()
    """What the new revision must achieve at each step."""
    rollback_on_failure: bool = True
    """Give all traffic back to the old revision when the analysis fails."""


class Rollout(Part):
    """How replicas are replaced when the spec changes."""

    rules = (
        Rule(
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            "maxSurge and maxUnavailable must not both be 0: no replica could ever be replaced",
            lambda r: r.max_surge > 0 or r.max_unavailable > 0,
            field="maxUnavailable",
        ),
    )

    max_surge: Annotated[int, Field(ge=0, le=1_000)] = 1
    """Replicas started beyond the wanted number. 0 with maxUnavailable 1 needs no spare accelerator."""
    max_unavailable: Annotated[int, Field(ge=0, le=1_000)] = 0
    """Replicas that may be missing from the wanted number."""
    progress_deadline_seconds: Annotated[int, Field(ge=60, le=86_400)] = 3_600
    """Seconds without progress after which the rollout counts as failed."""
    canary: Canary | None = None
    """Give a new revision traffic step by step."""


class Drain(Part):
    """How a replica ends without losing a request. The pod's grace period is the sum of both and 15 s."""

    propagation_seconds: Annotated[int, Field(ge=0, le=300)] = 10
    """How long a replica that was told to stop still takes requests, until every router knows."""
    timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """How long its running requests may take to finish."""


class RoutingStrategy(enum.StrEnum):
    """How the gateway chooses a replica."""

    ROUND_ROBIN = "RoundRobin"
    LEAST_LOADED = "LeastLoaded"
    POWER_OF_TWO = "PowerOfTwo"
    PREFIX_AWARE = "PrefixAware"
    SESSION = "Session"


class Saturation(Part):
    """When a replica counts as full; further requests wait in the gateway and go to whichever is free first."""

    queue_depth: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Waiting requests of a replica."""
    kv_cache_utilization: Fraction = "0.90"
    """Fraction of its KV blocks that live requests use."""


class Retry(Part):
    """Another attempt on another replica, only before the first byte of the answer."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 2
    """Attempts in total."""
    per_try_timeout_seconds: Annotated[int, Field(ge=1, le=3_600)] | None = None
    """How long one attempt may wait for the first byte; no limit of its own when omitted."""


class Routing(Part):
    """How the gateway spreads requests over the replicas."""

    rules = (
        Rule(
            "self.strategy != 'Session' || has(self.sessionHeader)",
            "strategy Session needs sessionHeader, the request header that names the session",
            lambda r: r.strategy is not RoutingStrategy.SESSION or r.session_header is not None,
            field="sessionHeader",
        ),
    )

    strategy: RoutingStrategy = RoutingStrategy.PREFIX_AWARE
    """RoundRobin, LeastLoaded, PowerOfTwo, PrefixAware or Session."""
    session_header: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9-]+$")] | None = None
    """Request header that names a session, for strategy Session."""
    saturation: Saturation = Saturation()
    """When a replica counts as full."""
    retry: Retry = Retry()
    """Attempts on other replicas."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Priority of requests without a tenant; tenants carry their own."""
    kv_events: bool = False
    """Replicas tell the gateway what they store in and remove from their prefix caches, for strategy PrefixAware."""


class Scheduling(Part):
    """On which nodes replicas run."""

    node_selector: Labels = {}
    """Labels that a node must carry."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that are tolerated."""
    affinity: AnyObject | None = None
    """Affinity, as in a pod."""
    topology_spread_constraints: Annotated[list[AnyObject], Field(max_length=8)] = []
    """Topology spread, as in a pod; replicas are spread over nodes when omitted."""
    priority_class_name: Annotated[str, Field(max_length=253)] | None = None
    """PriorityClass of the pods."""
    scheduler_name: Annotated[str, Field(max_length=253)] | None = None
    """Scheduler of the pods."""
    queue_name: Annotated[str, Field(max_length=253)] | None = None
    """Kueue LocalQueue of the pods."""
    runtime_class_name: Annotated[str, Field(max_length=253)] | None = None
    """RuntimeClass of the pods."""


class Tracing(Part):
    """OpenTelemetry traces of requests."""

    endpoint: Annotated[str, Field(max_length=512, pattern=r"^https?://.+")]
    """OTLP endpoint, such as http://otel-collector:4317."""
    sample_ratio: Fraction = "0.05"
    """Share of requests that are traced."""


class RequestLogging(enum.StrEnum):
    """What of a request appears in logs."""

    NONE = "None"
    METADATA = "Metadata"


class Observability(Part):
    """Traces, metrics and logs."""

    tracing: Tracing | None = None
    """OpenTelemetry traces of requests."""
    pod_monitor: bool = False
    """Make a PodMonitor, where the Prometheus operator is installed."""
    request_logging: RequestLogging = RequestLogging.NONE
    """None, or Metadata (model, token counts, times; never text)."""


class Partition(Part):
    """A slice of an accelerator, such as a MIG profile."""

    profile: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the profile, such as 1g.10gb."""


class Accelerator(Part):
    """What the accelerator must be."""

    type: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """Product name as nodes are labelled (nvidia.com/gpu.product), such as NVIDIA-H200."""
    min_memory: Quantity | None = None
    """Memory that one accelerator must have; the fit check uses it."""
    partition: Partition | None = None
    """A slice of an accelerator."""
    resource_claims: Annotated[list[DnsName], Field(max_length=8)] = []
    """Names of ResourceClaimTemplates (dynamic resource allocation)."""


class Parallelism(Part):
    """How one replica spreads over accelerators. Their product is the number of accelerators of a replica."""

    tensor: Annotated[int, Field(ge=1, le=256)] = 1
    """Accelerators that share each layer."""
    pipeline: Annotated[int, Field(ge=1, le=256)] = 1
    """Groups of layers, one after another."""
    data: Annotated[int, Field(ge=1, le=256)] = 1
    """Copies of the attention part within one replica."""
    expert: bool = False
    """Spread the experts of a mixture over the accelerators."""
    nodes: Annotated[int, Field(ge=1, le=256)] | None = None
    """Nodes of one replica; as many as its accelerators need, given resources per node, when omitted."""
