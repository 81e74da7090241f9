"""Replicas that span nodes: one LeaderWorkerSet, or two StatefulSets for each group where there is no such kind.

A group's first node serves and is the replica that everybody else sees; the others hold ranks only. All of them get
MASTER_ADDR, MASTER_PORT, NODE_RANK and NNODES, as torch.distributed wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import (
    COMPONENT,
    ENGINE_CONTAINER,
    GROUP_LABEL,
    REVISION_ANNOTATION,
    SERVICE_LABEL,
    WORKER,
    metadata,
)
from octavo_operator.render.pod import fill, pod_template
from octavo_operator.render.revision import template_revision

LEADER_WORKER_SET_VERSION = "leaderworkerset.x-k8s.io/v1"
MASTER_PORT = 29_500
_LWS = "leaderworkerset.sigs.k8s.io"


def nodes_name(service: str) -> str:
    """Name of the headless Service that names every node, and of the LeaderWorkerSet."""
    return f"{service}-nodes"


def group_name(service: str, index: int) -> str:
    """Name of the StatefulSet of a group's first node; that of the others ends in -w."""
    return f"{service}-g{index}"


def group_revision(workload: Workload) -> str:
    """The revision of the pods of a group."""
    return template_revision(pod_template(workload))


def nodes_service(workload: Workload) -> dict[str, Any]:
    """Names every node from the moment its pod exists: they must find each other before they can be ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(workload, nodes_name(workload.name)),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {SERVICE_LABEL: workload.service},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP"}],
        },
    }


def stateful_sets(workload: Workload, replicas: int) -> list[dict[str, Any]]:
    """Two StatefulSets for each group. Pods are replaced by deleting them: the operator does so group by group."""
    sets = []
    for index in range(replicas):
        name = group_name(workload.name, index)
        address = f"{name}-0.{nodes_name(workload.name)}.{workload.namespace}.svc"
        group = {GROUP_LABEL: str(index)}
        leader = _leader(workload, [_plain("NODE_RANK", "0"), _plain("MASTER_ADDR", address)], group)
        rank = _from_label("NODE_RANK", "apps.kubernetes.io/pod-index")
        worker = _worker(workload, [rank, _plain("MASTER_ADDR", address)], group)
        sets.append(_stateful_set(workload, name, 1, 0, leader))
        sets.append(_stateful_set(workload, f"{name}-w", workload.nodes - 1, 1, worker))
    return sets


def leader_worker_set(workload: Workload, replicas: int) -> dict[str, Any]:
    """The LeaderWorkerSet `NAME-nodes`; its controller recreates a whole group when one of its pods restarts."""
    name = nodes_name(workload.name)
    meta = metadata(workload, name)
    meta["annotations"] = {REVISION_ANNOTATION: group_revision(workload)}
    env = [
        _from_label("GROUP_INDEX", f"{_LWS}/group-index"),
        _from_label("NODE_RANK", f"{_LWS}/worker-index"),
        _plain("MASTER_ADDR", f"{name}-$(GROUP_INDEX).{name}.{workload.namespace}.svc"),
    ]
    return {
        "apiVersion": LEADER_WORKER_SET_VERSION,
        "kind": "LeaderWorkerSet",
        "metadata": meta,
        "spec": {
            "replicas": replicas,
            "startupPolicy": "LeaderCreated",
            "networkConfig": {"subdomainPolicy": "Shared"},
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {
                    "maxSurge": workload.rollout.max_surge,
                    "maxUnavailable": workload.rollout.max_unavailable,
                },
            },
            "leaderWorkerTemplate": {
                "size": workload.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": _leader(workload, env, {}),
                "workerTemplate": _worker(workload, env, {}),
            },
        },
    }


def _stateful_set(
    workload: Workload, name: str, replicas: int, first: int, template: Mapping[str, Any]
) -> dict[str, Any]:
    meta = metadata(workload, name)
    labels: Mapping[str, str] = template["metadata"]["labels"]
    meta["labels"] = {**dict(meta["labels"]), COMPONENT: labels[COMPONENT]}  # type: ignore[call-overload]
    meta["annotations"] = {REVISION_ANNOTATION: group_revision(workload)}
    selected = {key: labels[key] for key in (SERVICE_LABEL, COMPONENT, GROUP_LABEL)}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": meta,
        "spec": {
            "replicas": replicas,
            "serviceName": nodes_name(workload.name),
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "ordinals": {"start": first},
            "selector": {"matchLabels": selected},
            "template": dict(template),
        },
    }


def _leader(workload: Workload, env: list[dict[str, Any]], labels: Mapping[str, str]) -> dict[str, Any]:
    return _member(workload, env, labels, {})


def _worker(workload: Workload, env: list[dict[str, Any]], labels: Mapping[str, str]) -> dict[str, Any]:
    """Like the first node, but nothing is served or probed, and it ends only after the first has drained."""
    changes: dict[str, Any] = {
        "command": [fill(word, workload.port) for word in workload.worker_argv],
        "ports": [],
        "lifecycle": {"preStop": {"sleep": {"seconds": workload.drain.propagation_s + workload.drain.timeout_s}}},
        "startupProbe": None,
        "readinessProbe": None,
        "livenessProbe": None,
    }
    return _member(workload, env, {**labels, COMPONENT: WORKER}, changes)


def _member(
    workload: Workload, env: list[dict[str, Any]], labels: Mapping[str, str], changes: Mapping[str, Any]
) -> dict[str, Any]:
    template = pod_template(workload)
    common = [*env, _plain("MASTER_PORT", str(MASTER_PORT)), _plain("NNODES", str(workload.nodes))]
    containers = [
        _with_changes({**c, "env": [*common, *(c.get("env") or [])]}, changes) if c["name"] == ENGINE_CONTAINER else c
        for c in template["spec"]["containers"]
    ]
    about = {**template["metadata"], "labels": {**template["metadata"]["labels"], **labels}}
    return {**template, "metadata": about, "spec": {**template["spec"], "containers": containers}}


def _with_changes(container: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**container, **changes}.items() if value not in (None, [])}


def _plain(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def _from_label(name: str, label: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}
