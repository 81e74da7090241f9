"""A tenant is ready when every gateway that answers enforces this very generation with at least one key."""

from __future__ import annotations

from typing import Any

import pytest

from octavo_operator.api.inference_tenant import InferenceTenant
from octavo_operator.api.validation import parse
from octavo_operator.tenant_status import GatewayTenants, TenantReading, read_gateway, tenant_status

NOW = 1_800_000_000.0


def tenant(status: dict[str, Any] | None = None, **spec: Any) -> InferenceTenant:
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceTenant",
        "metadata": {"name": "acme", "generation": 3},
        "spec": {"keySecretRefs": [{"name": "acme-keys"}], **spec},
    }
    return parse(InferenceTenant, document if status is None else {**document, "status": status})


def gateway(generation: int = 3, keys: int = 2, problem: str = "", *, enforced: bool = True) -> GatewayTenants:
    return GatewayTenants(enforced, {"acme": TenantReading(generation, keys, problem)})


CASES = {
    "every gateway has it": (2, [gateway(), gateway()], {}, ("True", "Enforced"), 2),
    "one has fewer keys": (2, [gateway(), gateway(keys=1)], {}, ("True", "Enforced"), 1),
    "one knows the former generation": (2, [gateway(), gateway(generation=2)], {}, ("Unknown", "Propagating"), 2),
    "one does not know it": (2, [gateway(), GatewayTenants(True, {})], {}, ("Unknown", "Propagating"), 2),
    "one lets everybody in": (2, [gateway(), GatewayTenants(False, {})], {}, ("False", "NotEnforced"), 2),
    "a Secret is absent": (1, [gateway(keys=0, problem="there is no Secret 'x'")], {}, ("False", "InvalidKeys"), 0),
    "a Secret is empty": (1, [gateway(keys=0)], {}, ("False", "NoKeys"), 0),
    "it is suspended": (1, [gateway()], {"suspended": True}, ("False", "Suspended"), 2),
    "no gateway answers": (2, [], {}, ("Unknown", "GatewaySilent"), 0),
    "no gateway exists": (0, [], {}, ("Unknown", "NoGateway"), 0),
}


@pytest.mark.parametrize(("gateways", "answers", "spec", "expected", "keys"), CASES.values(), ids=CASES)
def test_the_status_is_what_the_gateways_say(
    gateways: int, answers: list[GatewayTenants], spec: dict[str, Any], expected: tuple[str, str], keys: int
) -> None:
    status = tenant_status(tenant(**spec), gateways, answers, NOW)
    (ready,) = status["conditions"]
    assert (ready["status"], ready["reason"]) == expected
    assert status["keys"] == keys
    assert status["observedGeneration"] == 3


def test_transition_times_move_only_with_the_status() -> None:
    first = tenant_status(tenant(), 1, [gateway()], NOW)
    assert tenant_status(tenant(status=first), 1, [gateway()], NOW + 100) == first
    (later,) = tenant_status(tenant(status=first), 1, [gateway(keys=0)], NOW + 100)["conditions"]
    assert later["lastTransitionTime"] == "2027-01-15T08:01:40Z"


@pytest.mark.parametrize("page", [None, [], {"tenants": [{}], "enforced": True}, {"tenants": []}, {"enforced": True}])
def test_what_is_no_page_of_a_gateway_is_no_answer(page: Any) -> None:
    assert read_gateway(page) is None
