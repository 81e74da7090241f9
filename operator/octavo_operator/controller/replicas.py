"""Where replicas and gateways answer HTTP."""

from __future__ import annotations

from octavo_operator.controller.client import Object

ADDRESS_ANNOTATION = "serving.octavo.dev/address"  # host:port of a replica that is no pod, in development and tests
GATEWAY_PORT = 9090  # metrics port of a gateway


def can_be_reached(pod: Object) -> bool:
    """Whether the pod has an address yet."""
    return bool((pod.get("status") or {}).get("podIP") or _annotated(pod))


def replica_url(pod: Object | None, port: int) -> str:
    """Base URL of a pod's port; of the annotated address where there is one."""
    annotated = _annotated(pod)
    ip = str(((pod or {}).get("status") or {}).get("podIP") or "")
    return f"http://{annotated or (f'[{ip}]:{port}' if ':' in ip else f'{ip}:{port}')}"


def _annotated(pod: Object | None) -> str:
    metadata = (pod or {}).get("metadata") or {}
    return str((metadata.get("annotations") or {}).get(ADDRESS_ANNOTATION) or "")
