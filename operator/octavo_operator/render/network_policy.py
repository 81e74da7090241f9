"""NetworkPolicy: who may reach the engines, and that they cannot reach the cloud's metadata service."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import (
    COMPONENT,
    GRPC_PORT,
    HTTP_PORT,
    KV_EVENTS_PORTS,
    PART_OF,
    SERVICE_LABEL,
    metadata,
    selector,
)

METADATA_SERVICES = {"0.0.0.0/0": ["169.254.169.254/32"], "::/0": ["fd00:ec2::254/128"]}


def network_policy(workload: Workload) -> dict[str, Any]:
    """Ingress from Octavo's gateway and operator and from the same namespace, to KV events from the gateway alone;
    egress but for cloud metadata."""
    ports = [{"protocol": "TCP", "port": HTTP_PORT}]
    if workload.grpc_port is not None:
        ports.append({"protocol": "TCP", "port": GRPC_PORT})
    octavo = _octavo("gateway", "operator")
    ingress: list[dict[str, Any]] = [{"from": [octavo, {"podSelector": {}}], "ports": ports}]
    if workload.routing.kv_events:
        told = [{"protocol": "TCP", "port": name} for name in KV_EVENTS_PORTS]
        ingress.append({"from": [_octavo("gateway")], "ports": told})
    pods = selector(workload.service)
    if workload.nodes > 1:  # its nodes talk to each other on ports that torch.distributed and NCCL choose
        pods = {SERVICE_LABEL: workload.service}
        ingress.append({"from": [{"podSelector": {"matchLabels": pods}}]})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(workload, workload.name),
        "spec": {
            "podSelector": {"matchLabels": pods},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": [
                {"to": [{"ipBlock": {"cidr": cidr, "except": refused}} for cidr, refused in METADATA_SERVICES.items()]},
                {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
            ],
        },
    }


def _octavo(*components: str) -> dict[str, Any]:
    """Pods of this installation, in whatever namespace."""
    return {
        "namespaceSelector": {},
        "podSelector": {
            "matchLabels": {PART_OF: "octavo"},
            "matchExpressions": [{"key": COMPONENT, "operator": "In", "values": list(components)}],
        },
    }
