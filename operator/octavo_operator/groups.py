"""Replicas that span nodes, as groups of pods: how they are, and which must be made anew. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo_operator.observation import DeploymentView, PodView, deployment_view

Raw = Mapping[str, Any]
TORN_FOR_S = 10.0
AGAIN_AFTER_S = 60.0


@dataclass(frozen=True)
class GroupView:
    """One replica: the pod of its first node, and those of the others. `outdated`: one is of a former template."""

    index: str
    leader: PodView | None
    workers: tuple[PodView, ...] = ()
    outdated: bool = False

    @property
    def members(self) -> tuple[PodView, ...]:
        return (*((self.leader,) if self.leader else ()), *self.workers)

    @property
    def available(self) -> bool:
        """Whether it serves and will go on to."""
        return self.leader is not None and self.leader.ready and not any(pod.deleting for pod in self.members)

    @property
    def torn(self) -> bool:
        """Whether some nodes began anew while others did not: their ranks may wait for each other for ever."""
        restarted = [pod.restarts > 0 for pod in self.members if not pod.deleting]
        return any(restarted) and not all(restarted) and not self.available


def group_views(pods: Iterable[PodView], newest: Mapping[str, str]) -> tuple[GroupView, ...]:
    """The groups of a service, by index. `newest` are the pod hashes of the newest templates, by StatefulSet."""
    members: dict[str, list[PodView]] = {}
    for pod in pods:
        members.setdefault(pod.group, []).append(pod)
    views = []
    for index in sorted(members, key=lambda text: (len(text), text)):
        found = members[index]
        outdated = any(newest.get(pod.owner, pod.template_hash) != pod.template_hash for pod in found)
        leader = next((pod for pod in found if not pod.worker), None)
        views.append(GroupView(index, leader, tuple(pod for pod in found if pod.worker), outdated))
    return tuple(views)


def newest_hashes(sets: Iterable[Raw]) -> dict[str, str]:
    """The hash of the newest template of each StatefulSet, by name; only where its controller has seen it."""
    hashes = {}
    for item in sets:
        status = item.get("status") or {}
        seen = int(status.get("observedGeneration") or 0) >= int(item["metadata"].get("generation") or 0)
        if seen and status.get("updateRevision"):
            hashes[str(item["metadata"]["name"])] = str(status["updateRevision"])
    return hashes


@dataclass
class GroupMemory:
    """Since when groups are torn, and when they were last made anew; Unix seconds by index."""

    torn_since: dict[str, float] = field(default_factory=dict)
    recreated_at: dict[str, float] = field(default_factory=dict)


def groups_to_recreate(
    groups: Sequence[GroupView], max_unavailable: int, memory: GroupMemory, now: float
) -> tuple[GroupView, ...]:
    """The groups whose pods shall all be deleted now; their StatefulSets make them anew.

    A torn group at once, once it has been for 10 s, and then not again within a minute. An outdated one while no more
    than `max_unavailable` groups, and at least one, are away.
    """
    memory.torn_since = {g.index: memory.torn_since.get(g.index, now) for g in groups if g.torn}
    chosen = [
        g
        for g in groups
        if g.torn
        and now - memory.torn_since[g.index] >= TORN_FOR_S
        and now - memory.recreated_at.get(g.index, -AGAIN_AFTER_S) >= AGAIN_AFTER_S
    ]
    away = sum(not g.available for g in groups)
    for group in groups:
        if not group.outdated or group in chosen or any(pod.deleting for pod in group.members):
            continue
        if not group.available:
            chosen.append(group)  # it is away already
        elif away < max(1, max_unavailable):
            chosen.append(group)
            away += 1
    for group in chosen:
        memory.recreated_at[group.index] = now
    return tuple(chosen)


def groups_deployment(sets: Sequence[Raw], groups: Sequence[GroupView]) -> DeploymentView | None:
    """The groups of a service seen as one Deployment of them; None where there are no StatefulSets."""
    views = [deployment_view(item) for item in sets]
    leaders = [item for item in sets if not str(item["metadata"]["name"]).endswith("-w")]
    if not leaders:
        return None
    updated = sum(not group.outdated for group in groups)
    ready = sum(group.available for group in groups)
    behind = any(view.observed_generation < view.generation for view in views)
    return replace(
        views[0],
        generation=1,
        observed_generation=0 if behind else 1,
        wanted=len(leaders),
        replicas=len(groups),
        updated=updated,
        ready=ready,
        available=ready,
    )
