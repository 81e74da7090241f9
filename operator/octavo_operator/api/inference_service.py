"""InferenceService: one model, served."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from pydantic import Field

from octavo_operator.api.autoscaling import Autoscaling, ScalingMode
from octavo_operator.api.base import API_VERSION, Part, Rule
from octavo_operator.api.inference_service_status import InferenceServiceStatus
from octavo_operator.api.kubernetes import DnsName, ObjectMeta, ResourceRequirements
from octavo_operator.api.model import EngineSpec, ModelSpec
from octavo_operator.api.operations import (
    Accelerator,
    AnyObject,
    Drain,
    Observability,
    Parallelism,
    Rollout,
    Routing,
    Scheduling,
)

MAX_NAME_LENGTH = 50  # leaves room for the suffixes of what is made from it


class RuntimeKind(enum.StrEnum):
    """Which kind of runtime is meant."""

    SERVING_RUNTIME = "ServingRuntime"
    CLUSTER_SERVING_RUNTIME = "ClusterServingRuntime"


class RuntimeRef(Part):
    """The runtime that serves the model."""

    name: DnsName
    """Name of the runtime, such as octavo or vllm."""
    kind: RuntimeKind = RuntimeKind.CLUSTER_SERVING_RUNTIME
    """ServingRuntime (same namespace) or ClusterServingRuntime."""


class InferenceServiceSpec(Part):
    """What is served and how."""

    rules = (
        Rule(
            "!has(self.replicas) || !has(self.autoscaling) || self.autoscaling.mode == 'External'",
            "replicas is fixed by hand or by an external autoscaler: remove it, or autoscaling, or set mode: External",
            lambda s: s.replicas is None or s.autoscaling is None or s.autoscaling.mode is ScalingMode.EXTERNAL,
            field="replicas",
        ),
        Rule(
            "!has(self.autoscaling) || self.autoscaling.mode != 'External' || has(self.replicas)",
            "mode External needs replicas, which the external autoscaler then sets through /scale",
            lambda s: s.autoscaling is None or s.autoscaling.mode is not ScalingMode.EXTERNAL or s.replicas is not None,
            field="replicas",
        ),
        Rule(
            "!has(self.parallelism) || self.parallelism.data == 1 || !has(self.rollout) || !has(self.rollout.canary)",
            "a canary rollout cannot be combined with data parallelism in v1alpha1",
            lambda s: s.parallelism.data == 1 or s.rollout.canary is None,
            field="rollout.canary",
        ),
    )

    suspend: bool = False
    """Keep the resource but run nothing."""
    runtime: RuntimeRef | None = None
    """The runtime; chosen by model format and priority when omitted."""
    model: ModelSpec
    """The model."""
    resources: ResourceRequirements = ResourceRequirements()
    """Compute resources of one replica (per node)."""
    accelerator: Accelerator | None = None
    """What the accelerator must be."""
    parallelism: Parallelism = Parallelism()
    """How one replica spreads over accelerators."""
    engine: EngineSpec = EngineSpec()
    """Portable knobs of the engine."""
    replicas: Annotated[int, Field(ge=0, le=1_000)] | None = None
    """A fixed number of replicas, or the one an external autoscaler sets; 1 without autoscaling."""
    autoscaling: Autoscaling | None = None
    """How the number of replicas follows the load."""
    rollout: Rollout = Rollout()
    """How replicas are replaced when the spec changes."""
    drain: Drain = Drain()
    """How a replica ends without losing a request."""
    routing: Routing = Routing()
    """How the gateway spreads requests."""
    scheduling: Scheduling = Scheduling()
    """On which nodes replicas run."""
    pod_template: AnyObject | None = None
    """Strategic merge patch over the pod that the operator renders. hostPath, privileged, host namespaces, a
    service-account token and LD_* variables are refused."""
    observability: Observability = Observability()
    """Traces, metrics and logs."""


class InferenceService(Part):
    """InferenceService serves one model: it runs the engine's replicas, scales them by load and routes requests to
    them. See `kubectl explain inferenceservices.serving.octavo.dev.spec`."""

    rules = (
        Rule(
            f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
            f"the name must have at most {MAX_NAME_LENGTH} characters",
            lambda s: len(s.metadata.name) <= MAX_NAME_LENGTH,
            field="metadata.name",
        ),
        Rule(
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "the name must start with a letter and hold only lower-case letters, digits and '-'",
            lambda s: is_dns_label(s.metadata.name),
            field="metadata.name",
        ),
    )

    api_version: Literal["serving.octavo.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["InferenceService"] = "InferenceService"
    metadata: ObjectMeta
    spec: InferenceServiceSpec
    """What is wanted."""
    status: InferenceServiceStatus | None = None
    """What is observed; written by the operator."""

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace or "default"

    @property
    def model_name(self) -> str:
        """The name that clients send as `model`."""
        return self.spec.model.name or self.metadata.name


def is_dns_label(name: str) -> bool:
    """Whether a name can start a Service's name (RFC 1035 label)."""
    return name[:1].isalpha() and name == name.lower() and name[-1:] != "-" and name.replace("-", "a").isalnum()
