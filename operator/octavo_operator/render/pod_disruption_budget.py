"""PodDisruptionBudget: node drains take one replica at a time, and never get stuck on a broken one."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import metadata, selector


def pod_disruption_budget(workload: Workload) -> dict[str, Any]:
    """The budget of a service. It is given as maxUnavailable: minAvailable would block drains of single replicas."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(workload, workload.name),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(workload.service)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
