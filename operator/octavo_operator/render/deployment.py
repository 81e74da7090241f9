"""Deployment: equal replicas of one engine."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import metadata, selector
from octavo_operator.render.pod import pod_template

REVISION_HISTORY = 5


def deployment(workload: Workload, replicas: int) -> dict[str, Any]:
    """The Deployment of a service."""
    rollout = workload.rollout
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(workload, workload.name),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": REVISION_HISTORY,
            "progressDeadlineSeconds": _progress_deadline_s(workload),
            "selector": {"matchLabels": selector(workload.service)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": rollout.max_surge, "maxUnavailable": rollout.max_unavailable},
            },
            "template": pod_template(workload),
        },
    }


def _progress_deadline_s(workload: Workload) -> int:
    """Never shorter than starting may take: a slow start is no failed rollout."""
    return max(workload.rollout.progress_deadline_seconds, workload.probes.startup_timeout_s + 60)
