"""tenant_status: whether every gateway enforces a tenant, from what the gateways themselves say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo_operator.api.inference_tenant import InferenceTenant
from octavo_operator.judgement import timestamp

MAX_MESSAGE = 1_024


@dataclass(frozen=True)
class TenantReading:
    """How one gateway read one tenant."""

    generation: int
    keys: int
    problem: str = ""


@dataclass(frozen=True)
class GatewayTenants:
    """What one gateway says: whether it asks for keys at all, and how it read each tenant, by name."""

    enforced: bool
    readings: Mapping[str, TenantReading]


def read_gateway(document: Any) -> GatewayTenants | None:
    """A gateway's `/tenants` page; None if it is none."""
    try:
        readings = {
            str(t["name"]): TenantReading(int(t["generation"]), int(t["keys"]), str(t["problem"]))
            for t in document["tenants"]
        }
        return GatewayTenants(bool(document["enforced"]), readings)
    except (KeyError, TypeError, ValueError):
        return None


def tenant_status(
    tenant: InferenceTenant, gateways: int, answers: Sequence[GatewayTenants], now: float
) -> dict[str, Any]:
    """The status of a tenant. `gateways` exist, `answers` are of those that answered; `now` in Unix seconds."""
    readings = [answer.readings.get(tenant.metadata.name) for answer in answers]
    known = [reading for reading in readings if reading is not None]
    keys = min((reading.keys for reading in known), default=0)
    status, reason, message = _verdict(tenant, gateways, answers, readings, keys)
    before = {c.type: c for c in tenant.status.conditions} if tenant.status else {}
    old = before.get("Ready")
    since = old.last_transition_time if old is not None and old.status.value == status else timestamp(now)
    return {
        "observedGeneration": tenant.metadata.generation,
        "keys": keys,
        "conditions": [
            {
                "type": "Ready",
                "status": status,
                "reason": reason,
                "message": message[:MAX_MESSAGE],
                "observedGeneration": tenant.metadata.generation,
                "lastTransitionTime": since,
            }
        ],
    }


def _verdict(
    tenant: InferenceTenant,
    gateways: int,
    answers: Sequence[GatewayTenants],
    readings: Sequence[TenantReading | None],
    keys: int,
) -> tuple[str, str, str]:
    """(status, reason, message)."""
    if not gateways:
        return "Unknown", "NoGateway", "no pod of the gateway exists"
    if not answers:
        return "Unknown", "GatewaySilent", f"none of {gateways} gateways answers; see their pods and the network policy"
    if not all(answer.enforced for answer in answers):
        hint = "a gateway lets everybody in: install the chart with gateway.tenants.enabled=true"
        return "False", "NotEnforced", hint
    problem = next((reading.problem for reading in readings if reading is not None and reading.problem), "")
    if problem:
        return "False", "InvalidKeys", problem
    wanted = tenant.metadata.generation or 0
    current = sum(reading is not None and reading.generation >= wanted for reading in readings)
    if current < len(answers):
        return "Unknown", "Propagating", f"{current} of {len(answers)} gateways know this generation"
    if tenant.spec.suspended:
        return "False", "Suspended", "spec.suspended is true; its requests are refused"
    if not keys:
        return "False", "NoKeys", "no Secret of spec.keySecretRefs holds a key"
    return "True", "Enforced", ""
