"""The few core Kubernetes types that Octavo's resources embed, as far as they are used."""

from __future__ import annotations

import enum
from typing import Annotated, Any

from pydantic import Field

from octavo_operator.api.base import Observed, Part, Rule
from octavo_operator.api.quantity import Quantity

DnsName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Labels = Annotated[dict[str, str], Field(max_length=64)]


class ObjectMeta(Observed):
    """Standard object metadata; only what Octavo reads."""

    name: str
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    owner_references: list[dict[str, Any]] = []
    finalizers: list[str] = []
    managed_fields: list[dict[str, Any]] = []


class ConditionStatus(enum.StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Observed):
    """One aspect of the observed state, as in metav1.Condition."""

    type: Annotated[str, Field(max_length=316)]
    """Name of the aspect, in CamelCase."""
    status: ConditionStatus
    """Whether it holds: True, False or Unknown."""
    reason: Annotated[str, Field(max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """Why, as one word for programs."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Why and what to do, for people."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """Generation of the spec this was judged against."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When the status last changed."""


class LocalObjectRef(Part):
    """A reference to an object of the same namespace."""

    name: DnsName
    """Name of the object."""


class SecretKeyRef(Part):
    """One key of a Secret of the same namespace. The operator passes the reference on; it never reads the value."""

    name: DnsName
    """Name of the Secret."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    """Key within the Secret."""


class ConfigMapKeyRef(Part):
    """One key of a ConfigMap of the same namespace."""

    name: DnsName
    """Name of the ConfigMap."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    """Key within the ConfigMap."""


class FieldRef(Part):
    """A field of the pod itself."""

    field_path: Annotated[str, Field(max_length=253)]
    """Path of the field, such as status.podIP."""


class EnvVarSource(Part):
    """Where the value of an environment variable comes from."""

    rules = (
        Rule(
            "[has(self.secretKeyRef), has(self.configMapKeyRef), has(self.fieldRef)].filter(x, x).size() == 1",
            "name exactly one of secretKeyRef, configMapKeyRef, fieldRef",
            lambda s: sum(x is not None for x in (s.secret_key_ref, s.config_map_key_ref, s.field_ref)) == 1,
        ),
    )

    secret_key_ref: SecretKeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: ConfigMapKeyRef | None = None
    """A key of a ConfigMap."""
    field_ref: FieldRef | None = None
    """A field of the pod."""


class EnvVar(Part):
    """One environment variable of the engine. Variables of the dynamic linker (LD_*) are refused."""

    rules = (
        Rule(
            "!(has(self.value) && has(self.valueFrom))",
            "give value or valueFrom, not both",
            lambda e: e.value is None or e.value_from is None,
        ),
        Rule(
            "!self.name.startsWith('LD_') && !(self.name in ['PYTHONSTARTUP', 'PYTHONHOME', 'BASH_ENV'])",
            "variables that change which code is loaded (LD_*, PYTHONSTARTUP, PYTHONHOME, BASH_ENV) are not allowed",
            lambda e: not is_code_loading(e.name),
            field="name",
        ),
    )

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value. Put secrets into a Secret and refer to it with valueFrom."""
    value_from: EnvVarSource | None = None
    """Where its value comes from."""


def is_code_loading(name: str) -> bool:
    """Whether an environment variable can make a process load other code (CVE-2025-23266 and its kind)."""
    return name.startswith("LD_") or name in {"PYTHONSTARTUP", "PYTHONHOME", "BASH_ENV"}


class ResourceRequirements(Part):
    """Compute resources of one replica, as in a container."""

    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """Upper bounds, such as cpu, memory, nvidia.com/gpu."""
    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """What the scheduler reserves; the limits when omitted."""


class Toleration(Part):
    """A taint of nodes that the replicas tolerate."""

    key: Annotated[str, Field(max_length=316)] | None = None
    """Key of the taint; every key when omitted (operator Exists)."""
    operator: Annotated[str, Field(pattern="^(Exists|Equal)$")] | None = None
    """Exists or Equal (the default)."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Value of the taint, for operator Equal."""
    effect: Annotated[str, Field(pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$")] | None = None
    """NoSchedule, PreferNoSchedule or NoExecute; every effect when omitted."""
    toleration_seconds: int | None = None
    """How long a NoExecute taint is tolerated."""
