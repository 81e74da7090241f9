"""`status` of an InferenceService: what the operator saw, and why it decided as it did."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from octavo_operator.api.base import Observed
from octavo_operator.api.kubernetes import Condition

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Int64 = Annotated[int, Field(json_schema_extra={"format": "int64"})]


class RuntimeStatus(Observed):
    """The runtime in use."""

    name: str
    """Name of the runtime."""
    kind: str = "ClusterServingRuntime"
    """Kind of the runtime."""
    image: str = ""
    """Image of the engine."""
    engine: str = ""
    """Engine of the runtime."""


class ModelStatus(Observed):
    """How far the model is loaded."""

    state: str = "Pending"
    """Pending, Downloading, Loading, Loaded or Failed."""
    revision: str = ""
    """Revision in use; the commit behind a branch where the hub told it."""
    bytes_total: Int64 | None = None
    """Size of the model's weights, where the hub told it."""
    load_seconds_p50: Annotated[int | None, Field(alias="loadSecondsP50")] = None
    """Median seconds from the start of a pod to its readiness."""
    last_failure: str | None = None
    """Last line of the log of the replica that failed last."""


class CapacityStatus(Observed):
    """What one replica was measured to carry."""

    kv_tokens_per_replica: int | None = None
    """Tokens that the KV cache of a replica holds."""
    max_concurrency_at_max_len: int | None = None
    """Requests of full length that fit at once."""
    peak_tokens_per_minute: int | None = None
    """Most tokens that a replica generated within one minute."""
    revision: str = ""
    """Revision of the pods that were measured."""


class ScalingDecision(Observed):
    """Inputs and results of the last decision."""

    demand: str = "0"
    """KV demand in replicas' worth of cache."""
    kv_desired: int | None = None
    """Replicas asked for by KV-cache utilization."""
    load_desired: int | None = None
    """Replicas asked for by offered load and backlog."""
    queue_desired: int | None = None
    """Replicas asked for by the queue guard."""
    slo_desired: int | None = None
    """Replicas asked for by the time-to-first-token guard."""
    ready: int = 0
    """Ready replicas at that time."""
    pending: int = 0
    """Replicas on their way at that time."""
    stale: int = 0
    """Ready replicas without fresh metrics."""
    waiting: int = 0
    """Waiting requests, in replicas and in the gateway."""
    running: int = 0
    """Running requests."""
    reason: str = ""
    """The signal that decided."""
    guard: str = ""
    """The guard that changed the result, if any."""
    message: str = ""
    """The decision in one sentence."""


class ScalingEvent(Observed):
    """One change of the number of replicas."""

    time: Time
    """When."""
    from_: Annotated[int, Field(alias="from")]
    """Replicas before."""
    to: int
    """Replicas after."""
    reason: str
    """Why."""


class ScalingStatus(Observed):
    """What the autoscaler sees and did."""

    kv_utilization: str = ""
    """Mean KV-cache utilization of ready replicas."""
    queue_depth: int = 0
    """Waiting requests, in replicas and in the gateway."""
    last_scale_time: Time | None = None
    """When the number of replicas last changed."""
    decision: ScalingDecision | None = None
    """Inputs and results of the last decision."""
    history: Annotated[list[ScalingEvent], Field(max_length=10)] = []
    """The latest changes, newest first."""
    learned: dict[str, str] = {}
    """Estimates that survive a restart of the operator."""


class RevisionStatus(Observed):
    """One revision of the pods."""

    name: str
    """Name of its ReplicaSet."""
    weight: int = 100
    """Percent of requests that it gets."""
    ready_replicas: int = 0
    """Its ready replicas."""


class CanaryStatus(Observed):
    """A new revision on trial."""

    revision: str
    """Which revision, by the hash of its pod template."""
    phase: str
    """Starting, Running, Promoting or RolledBack."""
    step: int = 0
    """Step of spec.rollout.canary, counted from 0."""
    weight: int = 0
    """Percent of requests that it gets."""
    since: Time
    """When the phase began."""
    message: str = ""
    """Why it does not go on, or was taken back."""


class AdapterStatus(Observed):
    """One LoRA adapter."""

    name: str
    """Name of the adapter."""
    state: str = "Pending"
    """Pending, Loaded or Failed."""
    ready_replicas: int = 0
    """Replicas that hold it."""
    message: str = ""
    """Why it is not loaded."""


class InferenceServiceStatus(Observed):
    """What is observed; written by the operator."""

    observed_generation: Int64 | None = None
    """Generation of the spec that this status speaks of."""
    url: str | None = None
    """Base address for OpenAI clients."""
    replicas: int = 0
    """Existing replicas."""
    ready_replicas: int = 0
    """Replicas that take requests."""
    desired_replicas: int = 0
    """Replicas that the autoscaler wants."""
    updated_replicas: int = 0
    """Replicas of the newest revision."""
    selector: str = ""
    """Label selector of the pods, for /scale."""
    conditions: Annotated[list[Condition], Field(max_length=32, json_schema_extra={"x-list-map-keys": ["type"]})] = []
    """Ready and the aspects it rests on."""
    runtime: RuntimeStatus | None = None
    """The runtime in use."""
    model: ModelStatus | None = None
    """How far the model is loaded."""
    capacity: CapacityStatus | None = None
    """What one replica was measured to carry."""
    scaling: ScalingStatus | None = None
    """What the autoscaler sees and did."""
    revisions: Annotated[list[RevisionStatus], Field(max_length=16)] = []
    """Revisions that have pods."""
    canary: CanaryStatus | None = None
    """A new revision on trial."""
    adapters: Annotated[list[AdapterStatus], Field(max_length=128)] = []
    """LoRA adapters."""
