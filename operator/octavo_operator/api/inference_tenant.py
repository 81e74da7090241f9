"""InferenceTenant: who may call which models, with what share and which limits. The gateway enforces it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from octavo_operator.api.base import API_VERSION, Observed, Part
from octavo_operator.api.inference_service_status import Int64
from octavo_operator.api.kubernetes import Condition, DnsName, ObjectMeta
from octavo_operator.api.quantity import PositiveDecimal

Limit = Annotated[int, Field(ge=1, le=1_000_000_000_000)]


class KeySecretRef(Part):
    """A Secret with API keys in the namespace that Octavo is installed in. Every entry of its data is one key: the
    name identifies it in usage records, the value is `sha256:` and the key's SHA-256 as 64 hexadecimal digits."""

    name: DnsName
    """Name of the Secret."""


class TenantLimits(Part):
    """Limits over all keys of the tenant; none when omitted."""

    requests_per_minute: Limit | None = None
    """Requests started per minute."""
    tokens_per_minute: Limit | None = None
    """Prompt and answer tokens per minute."""
    input_tokens_per_minute: Limit | None = None
    """Prompt tokens per minute that were not cached."""
    output_tokens_per_minute: Limit | None = None
    """Answer tokens per minute."""
    max_concurrent_requests: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests at once."""
    max_queued_requests: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Requests that may wait in the gateway."""
    tokens_per_day: Limit | None = None
    """Budget of tokens in a calendar day (UTC)."""
    cost_per_day: PositiveDecimal | None = None
    """Budget in the gateway's currency in a calendar day (UTC)."""
    tokens_per_month: Limit | None = None
    """Budget of tokens in a calendar month (UTC)."""
    cost_per_month: PositiveDecimal | None = None
    """Budget in the gateway's currency in a calendar month (UTC)."""


class InferenceTenantSpec(Part):
    """Keys, models, share and limits of one tenant."""

    display_name: Annotated[str, Field(max_length=253)] = ""
    """Name for people, in reports."""
    suspended: bool = False
    """Refuse every request of the tenant."""
    key_secret_refs: Annotated[
        list[KeySecretRef], Field(max_length=16, json_schema_extra={"x-list-map-keys": ["name"]})
    ] = []
    """Secrets with hashed API keys. Several make rotation easy: add the new one, then remove the old one."""
    allowed_models: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=256, json_schema_extra={"x-list-type": "set"}),
    ] = ["*"]
    """Model names the tenant may use; `*` stands for any characters."""
    weight: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Share of a saturated model, relative to the other tenants."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Priority of its requests."""
    max_priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Highest priority a request may ask for; the tenant's own when omitted."""
    limits: TenantLimits = TenantLimits()
    """Limits over all keys of the tenant."""


class InferenceTenantStatus(Observed):
    """What the gateways use."""

    observed_generation: Int64 | None = None
    """Generation that this status speaks of."""
    keys: int = 0
    """Valid keys."""
    conditions: Annotated[list[Condition], Field(max_length=8, json_schema_extra={"x-list-map-keys": ["type"]})] = []
    """Ready, and why not."""


class InferenceTenant(Part):
    """InferenceTenant says who may call which models, with what share and which limits."""

    api_version: Literal["serving.octavo.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["InferenceTenant"] = "InferenceTenant"
    metadata: ObjectMeta
    spec: InferenceTenantSpec
    """Keys, models, share and limits."""
    status: InferenceTenantStatus | None = None
    """What the gateways use."""
