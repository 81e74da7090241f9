"""Deployment: equal replicas of one engine; and a second one beside it while a new revision is on trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import CANARY, REVISION_ANNOTATION, TRACK_LABEL, metadata, selector
from octavo_operator.render.pod import pod_template
from octavo_operator.render.revision import template_revision

REVISION_HISTORY = 5


@dataclass(frozen=True)
class Kept:
    """A pod template that is kept as it runs, and its revision."""

    revision: str
    template: Mapping[str, Any]


def deployment(workload: Workload, replicas: int, kept: Kept | None = None) -> dict[str, Any]:
    """The Deployment of a service; `kept` is what its pods shall stay while another revision is on trial."""
    template = pod_template(workload)
    now = kept or Kept(template_revision(template), template)
    return _deployment(workload, workload.name, replicas, now, selector(workload.service))


def canary_deployment(workload: Workload, replicas: int) -> dict[str, Any]:
    """The Deployment `NAME-canary` of the revision on trial.

    The service's own selector matches these pods too and cannot be changed. That is safe: controllers only touch pods
    of their own ReplicaSets, whose selectors hold the hash of the template, and the track's label makes those differ.
    """
    template = pod_template(workload)
    revision = template_revision(template)
    labels = {**template["metadata"]["labels"], TRACK_LABEL: CANARY}
    marked = {**template, "metadata": {**template["metadata"], "labels": labels}}
    selected = {**selector(workload.service), TRACK_LABEL: CANARY}
    return _deployment(workload, canary_name(workload.name), replicas, Kept(revision, marked), selected)


def kept_revision(workload: Workload, kept: Kept) -> dict[str, Any]:
    """The ControllerRevision that remembers the template of the revision that serves, while another is on trial."""
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": metadata(workload, kept_name(workload.name, kept.revision)),
        "data": {"template": dict(kept.template)},
        "revision": 1,
    }


def canary_name(service: str) -> str:
    """Name of the Deployment of a revision on trial."""
    return f"{service}-canary"


def kept_name(service: str, revision: str) -> str:
    """Name of the ControllerRevision that remembers a revision."""
    return f"{service}-{revision}"


def _deployment(
    workload: Workload, name: str, replicas: int, pods: Kept, selected: Mapping[str, str]
) -> dict[str, Any]:
    rollout = workload.rollout
    meta = metadata(workload, name)
    meta["annotations"] = {REVISION_ANNOTATION: pods.revision}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": REVISION_HISTORY,
            "progressDeadlineSeconds": _progress_deadline_s(workload),
            "selector": {"matchLabels": dict(selected)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": rollout.max_surge, "maxUnavailable": rollout.max_unavailable},
            },
            "template": dict(pods.template),
        },
    }


def _progress_deadline_s(workload: Workload) -> int:
    """Never shorter than starting may take: a slow start is no failed rollout."""
    return max(workload.rollout.progress_deadline_seconds, workload.probes.startup_timeout_s + 60)
