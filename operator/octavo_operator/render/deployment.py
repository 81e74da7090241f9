"""Deployment: equal replicas of one engine."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import REVISION_ANNOTATION, metadata, selector
from octavo_operator.render.pod import pod_template
from octavo_operator.render.revision import template_revision

REVISION_HISTORY = 5


def deployment(workload: Workload, replicas: int) -> dict[str, Any]:
    """The Deployment of a service."""
    rollout, template = workload.rollout, pod_template(workload)
    meta = metadata(workload, workload.name)
    meta["annotations"] = {REVISION_ANNOTATION: template_revision(template)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": REVISION_HISTORY,
            "progressDeadlineSeconds": _progress_deadline_s(workload),
            "selector": {"matchLabels": selector(workload.service)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": rollout.max_surge, "maxUnavailable": rollout.max_unavailable},
            },
            "template": template,
        },
    }


def _progress_deadline_s(workload: Workload) -> int:
    """Never shorter than starting may take: a slow start is no failed rollout."""
    return max(workload.rollout.progress_deadline_seconds, workload.probes.startup_timeout_s + 60)
