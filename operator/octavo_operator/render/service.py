"""Services: one address for all replicas, and a headless one that names each."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import GRPC_PORT, HTTP_PORT, metadata, selector


def service(workload: Workload) -> dict[str, Any]:
    """The ClusterIP Service; it reaches ready replicas only."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(workload, workload.name),
        "spec": {"type": "ClusterIP", "selector": selector(workload.service), "ports": _ports(workload)},
    }


def headless_service(workload: Workload) -> dict[str, Any]:
    """The headless Service `NAME-replicas`, for routers that choose a replica themselves."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(workload, f"{workload.name}-replicas"),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "selector": selector(workload.service),
            "ports": _ports(workload),
        },
    }


def _ports(workload: Workload) -> list[dict[str, Any]]:
    ports = [_port(HTTP_PORT, workload.port)]
    if workload.grpc_port is not None:
        ports.append(_port(GRPC_PORT, workload.grpc_port))
    return ports


def _port(name: str, number: int) -> dict[str, Any]:
    app_protocol = {"appProtocol": "kubernetes.io/h2c"} if name == GRPC_PORT else {}
    return {"name": name, "port": number, "targetPort": name, "protocol": "TCP", **app_protocol}
