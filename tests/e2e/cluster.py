"""What tests against a control plane share: objects to write, and conditions to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import control_plane
from e2e.control_plane import ControlPlane
from octavo_operator.controller.client import ApiError, Kind, KubeClient
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.run import Operator
from octavo_operator.controller.settings import OperatorSettings

ROOT = Path(__file__).parents[2]
CRD = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
SERVICE = Kind("v1", "Service", "services")
POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")
PDB = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
SMOLLM2 = yaml.safe_load((ROOT / "examples" / "smollm2.yaml").read_text())
WAIT_S = 30.0


async def install_crds(plane: ControlPlane) -> None:
    """Install our CRDs and wait until the API server serves them."""
    client = control_plane.connect(plane)
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        await client.apply(CRD, yaml.safe_load(path.read_text()))
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        name = yaml.safe_load(path.read_text())["metadata"]["name"]
        await until(lambda name=name: _established(client, name), "the CRD is established")
    await client.close()


async def _established(client: KubeClient, name: str) -> bool:
    crd = await client.get(CRD, None, name)
    conditions = (crd.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def manifest(namespace: str, **spec: Any) -> dict[str, Any]:
    return {**SMOLLM2, "metadata": {"name": "smollm2", "namespace": namespace}, "spec": {**SMOLLM2["spec"], **spec}}


async def until(check: Callable[[], Awaitable[Any]], what: str, timeout_s: float = WAIT_S) -> Any:
    """The first true answer of `check`; fails with what was last seen."""
    deadline, seen = time.monotonic() + timeout_s, None
    while time.monotonic() < deadline:
        try:
            seen = await check()
        except ApiError as error:
            seen = error
        if seen and not isinstance(seen, ApiError):
            return seen
        await asyncio.sleep(0.2)
    pytest.fail(f"waited {timeout_s:.0f} s until {what}; last seen: {seen}")


async def condition(
    client: KubeClient, namespace: str, type_: str, kind: Kind = INFERENCE_SERVICE, name: str = "smollm2"
) -> dict[str, Any]:
    found = await client.get(kind, namespace, name)
    conditions = (found.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == type_), {})


async def reaches(
    client: KubeClient,
    namespace: str,
    type_: str,
    status: str,
    reason: str = "",
    timeout_s: float = WAIT_S,
    name: str = "smollm2",
) -> dict[str, Any]:
    async def check() -> Any:
        seen = await condition(client, namespace, type_, name=name)
        return seen if seen.get("status") == status and reason in ("", seen.get("reason")) else None

    found: dict[str, Any] = await until(check, f"{type_} of {name} is {status} {reason}", timeout_s)
    return found


async def is_gone(client: KubeClient, kind: Kind, namespace: str, name: str) -> bool:
    try:
        await client.get(kind, namespace, name)
    except ApiError as error:
        return error.is_missing
    return False


def run_operator(namespace: str, **changes: Any) -> Operator:
    """The operator in a thread, quick to look again."""
    settings = OperatorSettings(
        namespaces=(namespace,), own_namespace=namespace, scaling_interval_s=0.3, scrape_timeout_s=0.5, **changes
    )
    operator = Operator(settings)
    operator.start()
    assert operator.ready.wait(20), "kopf did not become ready"
    return operator
