"""What the cluster shows of a service, read from raw objects into plain values. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo_operator.render.labels import (
    CANARY,
    COMPONENT,
    ENGINE_CONTAINER,
    GROUP_LABEL,
    REVISION_ANNOTATION,
    TRACK_LABEL,
    WORKER,
)

Raw = Mapping[str, Any]
LWS_GROUP_LABEL = "leaderworkerset.sigs.k8s.io/group-index"


@dataclass(frozen=True)
class PodView:
    """One replica's pod. Times are Unix seconds; `exit_*` describe the engine's last end."""

    name: str
    ip: str = ""
    phase: str = "Pending"
    ready: bool = False
    started: bool = False
    scheduled: bool = False
    deleting: bool = False
    created_at: float = 0.0
    ready_at: float | None = None
    restarts: int = 0
    waiting_reason: str = ""
    waiting_message: str = ""
    exit_code: int | None = None
    exit_reason: str = ""
    exit_message: str = ""
    unscheduled_message: str = ""
    template_hash: str = ""
    canary: bool = False  # of a revision on trial
    worker: bool = False  # a node of a replica that spans several, but not the one that serves
    group: str = ""  # which replica that is
    owner: str = ""  # name of the controller

    @property
    def counts(self) -> bool:
        """Whether it is a replica that serves or will serve."""
        return not self.deleting and self.phase not in ("Failed", "Succeeded")

    @property
    def failing(self) -> bool:
        """Whether it will not become ready without something changing."""
        broken = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError")
        return self.waiting_reason in (*broken, "CreateContainerError", "CrashLoopBackOff", "RunContainerError")

    @property
    def unschedulable(self) -> bool:
        return not self.scheduled and bool(self.unscheduled_message)


@dataclass(frozen=True)
class DeploymentView:
    """The Deployment of a service; None where it does not exist yet."""

    generation: int = 0
    observed_generation: int = 0
    wanted: int = 0
    replicas: int = 0
    updated: int = 0
    ready: int = 0
    available: int = 0
    failure_reason: str = ""  # why pods cannot be created: quota, admission
    failure_message: str = ""
    deadline_exceeded: bool = False
    revision: str = ""  # of the pod template that the operator rendered

    @property
    def rolling(self) -> bool:
        """Whether a rollout is in progress."""
        return self.observed_generation < self.generation or self.updated < self.wanted or self.replicas > self.updated


@dataclass(frozen=True)
class Observation:
    """Everything seen of a service at one time."""

    deployment: DeploymentView | None = None
    pods: tuple[PodView, ...] = ()
    canary: DeploymentView | None = None  # of a revision on trial
    workers: tuple[PodView, ...] = ()  # the other nodes of replicas that span several

    @property
    def ready(self) -> tuple[PodView, ...]:
        return tuple(p for p in self.pods if p.counts and p.ready)

    @property
    def unschedulable(self) -> tuple[PodView, ...]:
        """Replicas without a node to run on, or with too few."""
        stuck = {p.group for p in self.workers if p.counts and p.unschedulable}
        return tuple(p for p in self.pods if p.counts and (p.unschedulable or (p.group and p.group in stuck)))

    @property
    def pending(self) -> tuple[PodView, ...]:
        """Replicas on their way: neither ready, nor failing, nor without a node to run on."""
        stuck = self.unschedulable
        return tuple(p for p in self.pods if p.counts and not p.ready and not p.failing and p not in stuck)


def observe(deployment: Raw | None, pods: Iterable[Raw], canary: Raw | None = None) -> Observation:
    """The observation of a service whose replicas are single pods, or those of a LeaderWorkerSet."""
    replicas, workers = split_pods(pods)
    return Observation(
        None if deployment is None else deployment_view(deployment),
        replicas,
        None if canary is None else deployment_view(canary),
        workers,
    )


def split_pods(pods: Iterable[Raw]) -> tuple[tuple[PodView, ...], tuple[PodView, ...]]:
    """(those that serve, the other nodes of replicas that span several), by name."""
    views = sorted((pod_view(pod) for pod in pods), key=lambda pod: pod.name)
    return tuple(v for v in views if not v.worker), tuple(v for v in views if v.worker)


def pod_view(pod: Raw, container: str = ENGINE_CONTAINER) -> PodView:
    """One pod, judged by this container."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    engine: Raw = next((c for c in status.get("containerStatuses") or [] if c["name"] == container), {})
    waiting = (engine.get("state") or {}).get("waiting") or {}
    ended = (engine.get("state") or {}).get("terminated") or (engine.get("lastState") or {}).get("terminated") or {}
    scheduled, ready = conditions.get("PodScheduled", {}), conditions.get("Ready", {})
    is_ready = ready.get("status") == "True"
    labels = metadata.get("labels") or {}
    unscheduled = scheduled.get("status") == "False" and scheduled.get("reason") in ("Unschedulable", "SchedulingGated")
    return PodView(
        name=metadata["name"],
        ip=status.get("podIP") or "",
        phase=status.get("phase") or "Pending",
        ready=is_ready,
        started=bool(engine.get("started")),
        scheduled=scheduled.get("status") == "True",
        deleting=bool(metadata.get("deletionTimestamp")),
        created_at=seconds(metadata.get("creationTimestamp")) or 0.0,
        ready_at=seconds(ready.get("lastTransitionTime")) if is_ready else None,
        restarts=int(engine.get("restartCount") or 0),
        waiting_reason=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason") or "",
        exit_message=ended.get("message") or "",
        unscheduled_message=scheduled.get("message", "") if unscheduled else "",
        template_hash=labels.get("pod-template-hash") or labels.get("controller-revision-hash", ""),
        canary=labels.get(TRACK_LABEL) == CANARY,
        worker=labels.get(COMPONENT) == WORKER,
        group=labels.get(GROUP_LABEL) or labels.get(LWS_GROUP_LABEL, ""),
        owner=next((r["name"] for r in metadata.get("ownerReferences") or [] if r.get("controller")), ""),
    )


def deployment_view(deployment: Raw) -> DeploymentView:
    """One Deployment."""
    status, spec = deployment.get("status") or {}, deployment.get("spec") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    failure, progress = conditions.get("ReplicaFailure", {}), conditions.get("Progressing", {})
    failed = failure.get("status") == "True"
    return DeploymentView(
        generation=int(deployment["metadata"].get("generation") or 0),
        observed_generation=int(status.get("observedGeneration") or 0),
        wanted=int(spec.get("replicas") or 0),
        replicas=int(status.get("replicas") or 0),
        updated=int(status.get("updatedReplicas") or 0),
        ready=int(status.get("readyReplicas") or 0),
        available=int(status.get("availableReplicas") or 0),
        failure_reason=failure.get("reason", "") if failed else "",
        failure_message=failure.get("message", "") if failed else "",
        deadline_exceeded=progress.get("reason") == "ProgressDeadlineExceeded",
        revision=(deployment["metadata"].get("annotations") or {}).get(REVISION_ANNOTATION, ""),
    )


def seconds(time: str | None) -> float | None:
    """Unix seconds of a Kubernetes time."""
    if not time:
        return None
    return dt.datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()
