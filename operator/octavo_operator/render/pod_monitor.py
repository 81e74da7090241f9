"""PodMonitor: scraping of the engines by the Prometheus operator, where it is installed."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import HTTP_PORT, metadata, selector


def pod_monitor(workload: Workload) -> dict[str, Any]:
    """The PodMonitor of a service."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(workload, workload.name),
        "spec": {
            "selector": {"matchLabels": selector(workload.service)},
            "podMetricsEndpoints": [{"port": HTTP_PORT, "path": workload.metrics.path, "interval": "15s"}],
        },
    }
