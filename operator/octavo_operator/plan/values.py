"""What a Plan is made of: plain frozen values that know neither Kubernetes objects nor processes."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from octavo_operator.api.errors import FieldError, OctavoOperatorError
from octavo_operator.api.kubernetes import EnvVarSource, SecretKeyRef
from octavo_operator.api.operations import Observability, Rollout, Scheduling
from octavo_operator.api.serving_runtime import AdapterApi, MetricMap
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.plan.shape import Fit, ModelShape

GRACE_MARGIN_S = 15
DEFAULT_ENGINE_IMAGE = "ghcr.io/octavo-dev/octavo-engine:latest"
_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Target(enum.StrEnum):
    """What a Plan is for."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


@dataclass(frozen=True)
class ModelClaim:
    """A volume that holds a model: the claim, the path within it and whether the download is complete."""

    claim: str
    path: str = ""
    ready: bool = True
    message: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a stored model; `unknown` says why its shape is not."""

    shape: ModelShape | None = None
    revision: str = ""  # the commit that a branch stands for
    unknown: str = "the model's shape is not known"


@dataclass(frozen=True)
class Facts:
    """What a plan depends on beyond the service and its runtime."""

    target: Target = Target.CLUSTER
    engine_image: str | None = None  # the release's image of Octavo's own engine
    model_claims: Mapping[str, ModelClaim] = field(default_factory=lambda: MappingProxyType({}))  # by ModelCache
    leader_worker_set: bool = False  # whether the cluster has that kind
    model: ModelFacts = field(default_factory=lambda: ModelFacts())


@dataclass(frozen=True)
class HttpProbe:
    """An HTTP GET that must answer 200; times in seconds."""

    path: str
    period_s: int
    timeout_s: int
    failure_threshold: int


@dataclass(frozen=True)
class Probes:
    """`startup` covers loading the model; the other two begin when it succeeded."""

    startup: HttpProbe
    readiness: HttpProbe
    liveness: HttpProbe

    @property
    def startup_timeout_s(self) -> int:
        """Longest time that starting may take."""
        return self.startup.period_s * self.startup.failure_threshold


@dataclass(frozen=True)
class DrainPlan:
    """How a replica ends; seconds. `pre_stop_sleep_s` is 0 for engines that wait for propagation themselves."""

    propagation_s: int
    timeout_s: int
    engine_waits: bool

    @property
    def pre_stop_sleep_s(self) -> int:
        return 0 if self.engine_waits else self.propagation_s

    @property
    def grace_period_s(self) -> int:
        """Time from the wish to stop until the process is killed; always above propagation + drain."""
        return self.propagation_s + self.timeout_s + GRACE_MARGIN_S


@dataclass(frozen=True)
class ReplicaBounds:
    """Bounds of the number of replicas, and the number to start with."""

    min: int
    max: int
    initial: int


@dataclass(frozen=True)
class Resources:
    """Quantities by resource name, as written."""

    limits: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    requests: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def accelerator(self) -> str | None:
        """Resource name of the accelerator, or None for a CPU service."""
        return next((name for name in self.limits if is_accelerator(name)), None)

    @property
    def accelerators(self) -> int:
        """How many accelerators one replica has."""
        return int(self.limits[self.accelerator]) if self.accelerator else 0


@dataclass(frozen=True)
class EnvReference:
    """An environment variable whose value is kept elsewhere."""

    name: str
    source: EnvVarSource


@dataclass(frozen=True)
class ClaimMount:
    """A PersistentVolumeClaim mounted read-only."""

    claim: str
    mount_path: str


@dataclass(frozen=True)
class RoutingPlan:
    """How the gateway treats the service. Fractions and seconds."""

    strategy: str
    session_header: str | None
    saturation_queue_depth: int
    saturation_kv_cache_utilization: float
    max_held_requests: int
    hold_timeout_s: float
    retry_attempts: int
    retry_per_try_timeout_s: float | None
    priority: int
    kv_events: bool = False  # replicas tell what their prefix caches hold


@dataclass(frozen=True)
class Workload:
    """Equal replicas of one engine process. `{host}`, `{port}`, `{kv_events}` and `{kv_replay}` in argv are filled in
    per replica."""

    name: str
    namespace: str
    service: str  # name of the InferenceService
    model_names: tuple[str, ...]  # the model's name, then its aliases
    task: str
    engine: str
    image: str
    replicas: ReplicaBounds
    argv: tuple[str, ...]
    env: Mapping[str, str]
    env_references: tuple[EnvReference, ...]
    port: int
    grpc_port: int | None
    probes: Probes
    drain: DrainPlan
    resources: Resources
    scaling: ScalingPolicy
    routing: RoutingPlan
    metrics: MetricMap
    protocols: tuple[str, ...] = ()
    claims: tuple[ClaimMount, ...] = ()
    run_as_user: int = 65_532
    writable_root: bool = False
    scheduling: Scheduling = field(default_factory=Scheduling)
    node_labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    resource_claims: tuple[str, ...] = ()
    rollout: Rollout = field(default_factory=Rollout)
    observability: Observability = field(default_factory=Observability)
    pod_template: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    credentials: SecretKeyRef | None = None
    adapters: Mapping[str, str] = field(default_factory=lambda: _EMPTY)  # paths by name, as the engine is told
    adapter_api: AdapterApi | None = None  # None where adapters cannot come and go
    nodes: int = 1  # of one replica
    worker_argv: tuple[str, ...] = ()  # of the nodes of a replica that do not serve
    leader_worker_set: bool = False  # whether replicas that span nodes are kept by a LeaderWorkerSet

    @property
    def model_name(self) -> str:
        return self.model_names[0]


@dataclass(frozen=True)
class Plan:
    """The workloads of one service. `waiting_for` says in words what must happen before they may start."""

    workloads: tuple[Workload, ...]
    warnings: tuple[str, ...] = ()
    runtime: str = ""
    waiting_for: str = ""
    fit: Fit | None = None
    not_estimated: str = ""  # why there is no `fit`
    model: ModelFacts = field(default_factory=ModelFacts)


class Unplannable(OctavoOperatorError):  # noqa: N818 - the condition's own word
    """A service that cannot be run as asked. `reason` is the reason of its RuntimeResolved condition."""

    def __init__(self, reason: str, errors: Sequence[FieldError]) -> None:
        self.reason = reason
        self.errors = tuple(errors)
        super().__init__("; ".join(str(error) for error in self.errors))


def is_accelerator(resource: str) -> bool:
    """Whether a resource name means GPUs or the like: every extended resource of a vendor's device plugin."""
    domain, _, device = resource.partition("/")
    return bool(device) and (device.startswith(("gpu", "mig-", "npu", "neuron", "gaudi")) or domain == "gpu.intel.com")
