"""render_plan: every object of a service, in the order in which they should be applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octavo_operator.api.base import API_VERSION
from octavo_operator.plan.values import Plan, Workload
from octavo_operator.render.config_map import config_map
from octavo_operator.render.deployment import Kept, canary_deployment, deployment, kept_revision
from octavo_operator.render.groups import leader_worker_set, nodes_service, stateful_sets
from octavo_operator.render.network_policy import network_policy
from octavo_operator.render.pod_disruption_budget import pod_disruption_budget
from octavo_operator.render.pod_monitor import pod_monitor
from octavo_operator.render.service import headless_service, service
from octavo_operator.render.service_account import service_account

Object = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """The resource that what is rendered belongs to: when it goes, they go."""

    kind: str
    name: str
    uid: str

    def reference(self) -> Object:
        """The ownerReference."""
        return {
            "apiVersion": API_VERSION,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


@dataclass(frozen=True)
class CanaryRender:
    """A revision on trial: its replicas, the percent of requests it gets, and what the others stay meanwhile.

    `kept` is None once the new revision takes over.
    """

    weight: int
    replicas: int
    kept: Kept | None


def render_plan(
    plan: Plan, owner: Owner | None = None, replicas: int | None = None, canary: CanaryRender | None = None
) -> list[Object]:
    """The objects of a plan. `replicas` overrides the number to start with, those of a canary not counted.

    Raises `Unplannable` when the pod template holds something that is refused.
    """
    objects = [obj for workload in plan.workloads for obj in _render_workload(workload, replicas, canary)]
    if owner is not None:
        for obj in objects:
            obj["metadata"]["ownerReferences"] = [owner.reference()]
    return objects


def _render_workload(workload: Workload, replicas: int | None, canary: CanaryRender | None) -> list[Object]:
    count = workload.replicas.initial if replicas is None else replicas
    objects = [
        service_account(workload),
        config_map(workload, None if canary is None else canary.weight),
        service(workload),
        headless_service(workload),
        network_policy(workload),
        pod_disruption_budget(workload),
        *_replicas(workload, count, canary),
    ]
    if workload.observability.pod_monitor:
        objects.append(pod_monitor(workload))
    return objects


def _replicas(workload: Workload, count: int, canary: CanaryRender | None) -> list[Object]:
    """What makes and keeps the pods."""
    if workload.nodes > 1 and workload.leader_worker_set:
        return [leader_worker_set(workload, count)]
    if workload.nodes > 1:
        return [nodes_service(workload), *stateful_sets(workload, count)]
    objects = [deployment(workload, count, canary.kept if canary else None)]
    if canary is not None and canary.kept is not None:
        objects.append(kept_revision(workload, canary.kept))
    if canary is not None and canary.replicas:
        objects.append(canary_deployment(workload, canary.replicas))
    return objects
