"""ConfigMap: what a gateway must know to route to the service, with every default filled in."""

from __future__ import annotations

import json
from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import KV_EVENTS_PORTS, metadata

ROUTE_KEY = "route.json"
ROUTE_LABEL = "serving.octavo.dev/route"


def config_map(workload: Workload, canary_weight: int | None = None) -> dict[str, Any]:
    """The ConfigMap `NAME-route`; gateways find it by its label."""
    told = route(workload)
    if canary_weight is not None:
        told["canary"] = {"weight": canary_weight}
    meta = metadata(workload, f"{workload.name}-route")
    meta["labels"] = {**dict(meta["labels"]), ROUTE_LABEL: "true"}  # type: ignore[call-overload]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "data": {ROUTE_KEY: json.dumps(told, indent=1, sort_keys=True)},
    }


def route(workload: Workload) -> dict[str, Any]:
    """How the gateway treats the service."""
    routing, replicas = workload.routing, workload.replicas
    events, replay = KV_EVENTS_PORTS.values()
    return {
        "service": workload.service,
        "namespace": workload.namespace,
        "models": list(workload.model_names),
        "task": workload.task,
        "engine": workload.engine,
        "protocols": list(workload.protocols),
        "port": workload.port,
        "grpcPort": workload.grpc_port,
        "kvEvents": {"port": events, "replayPort": replay} if routing.kv_events else None,
        "strategy": routing.strategy,
        "sessionHeader": routing.session_header,
        "saturation": {
            "queueDepth": routing.saturation_queue_depth,
            "kvCacheUtilization": routing.saturation_kv_cache_utilization,
        },
        "hold": {"maxHeldRequests": routing.max_held_requests, "timeoutSeconds": routing.hold_timeout_s},
        "retry": {"attempts": routing.retry_attempts, "perTryTimeoutSeconds": routing.retry_per_try_timeout_s},
        "priority": routing.priority,
        "scaleToZero": replicas.min == 0 and replicas.max > 0,
        "metrics": workload.metrics.model_dump(by_alias=True, exclude_defaults=True, mode="json"),
    }
