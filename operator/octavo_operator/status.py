"""service_status: conditions and numbers from what is observed, never from what was intended. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.autoscale.decide import Decision
from octavo_operator.faults import Fault, find_fault, last_line
from octavo_operator.observation import Observation, PodView
from octavo_operator.plan import Plan, Unplannable
from octavo_operator.render.labels import SERVICE_LABEL

HISTORY_LENGTH = 10
MAX_MESSAGE = 1_024

Status = dict[str, Any]


@dataclass(frozen=True)
class Scaling:
    """One change of the number of replicas; `time` is Unix seconds."""

    time: float
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class Judgement:
    """What is known when a status is written. `plan` is None when the service could not be planned."""

    service: InferenceService
    plan: Plan | None
    refusal: Unplannable | None
    observation: Observation
    now: float
    gateway_url: str = ""
    decision: Decision | None = None
    apply_error: str = ""
    runtime_kind: str = "ClusterServingRuntime"
    scalings: tuple[Scaling, ...] = ()  # those since the operator started, newest first


def service_status(judgement: Judgement) -> Status:
    """The status of a service; fields that are not known are left out. Times move only when what they tell moves."""
    service, observation, plan = judgement.service, judgement.observation, judgement.plan
    previous = _previous(service)
    deployment = observation.deployment
    status: Status = {
        "observedGeneration": service.metadata.generation,
        "replicas": deployment.replicas if deployment else 0,
        "readyReplicas": len(observation.ready),
        "desiredReplicas": deployment.wanted if deployment else 0,
        "updatedReplicas": deployment.updated if deployment else 0,
        "selector": f"{SERVICE_LABEL}={service.name}",
        "conditions": _conditions(judgement, previous),
        "model": _model(judgement),
    }
    if judgement.gateway_url:
        status["url"] = judgement.gateway_url
    if plan is not None and plan.workloads:
        first = plan.workloads[0]
        status["runtime"] = {
            "name": plan.runtime,
            "kind": judgement.runtime_kind,
            "image": first.image,
            "engine": first.engine,
        }
    if judgement.decision is not None:
        status["scaling"] = _scaling(judgement, judgement.decision, previous.get("scaling") or {})
    elif previous.get("scaling"):
        status["scaling"] = previous["scaling"]
    return status


def without_change(old: Mapping[str, Any] | None, new: Status) -> bool:
    """Whether the status says nothing new; the numbers of the last decision alone are no news."""
    return old is not None and _newsworthy(old) == _newsworthy(new)


def timestamp(now: float) -> str:
    """Unix seconds as Kubernetes writes times."""
    return dt.datetime.fromtimestamp(int(now), tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _conditions(judgement: Judgement, previous: Mapping[str, Any]) -> list[dict[str, Any]]:
    fault = find_fault(judgement.observation)
    verdicts = [
        _resolved(judgement),
        _scheduled(judgement, fault),
        _model_ready(judgement, fault),
        _progressing(judgement),
        _scaling_active(judgement, previous),
        _degraded(judgement, fault),
    ]
    verdicts.insert(0, _ready(judgement, verdicts))
    before = {c["type"]: c for c in previous.get("conditions") or []}
    return [_condition(v, before.get(v.type), judgement) for v in verdicts]


@dataclass(frozen=True)
class _Verdict:
    type: str
    status: str  # True, False or Unknown
    reason: str
    message: str = ""


def _condition(verdict: _Verdict, before: Mapping[str, Any] | None, judgement: Judgement) -> dict[str, Any]:
    same = before is not None and before.get("status") == verdict.status
    return {
        "type": verdict.type,
        "status": verdict.status,
        "reason": verdict.reason,
        "message": verdict.message[:MAX_MESSAGE],
        "observedGeneration": judgement.service.metadata.generation,
        "lastTransitionTime": before["lastTransitionTime"] if same and before else timestamp(judgement.now),
    }


def _ready(judgement: Judgement, others: Sequence[_Verdict]) -> _Verdict:
    ready, service = len(judgement.observation.ready), judgement.service
    if service.spec.suspend:
        return _Verdict("Ready", "False", "Suspended", "spec.suspend is true; nothing runs")
    needed = _needed(judgement)
    if ready and ready >= needed:
        return _Verdict("Ready", "True", "MinimumReplicasAvailable", f"{ready} replicas answer requests")
    by_type = {v.type: v for v in others}
    if by_type["RuntimeResolved"].status == "False":
        cause = by_type["RuntimeResolved"]
        return _Verdict("Ready", "False", cause.reason, cause.message)
    deployment = judgement.observation.deployment
    if not needed and deployment is not None and not deployment.wanted:
        return _Verdict("Ready", "True", "ScaledToZero", "no replica runs; the first request starts one")
    for type_ in ("PodsScheduled", "ModelReady"):
        if by_type[type_].status == "False":
            return _Verdict("Ready", "False", by_type[type_].reason, by_type[type_].message)
    return _Verdict("Ready", "False", "ReplicasNotReady", f"{ready} of {max(needed, 1)} replicas answer requests")


def _needed(judgement: Judgement) -> int:
    """Replicas below which the service does not keep its promise."""
    if judgement.plan is None or not judgement.plan.workloads:
        return 1
    return judgement.plan.workloads[0].replicas.min


def _resolved(judgement: Judgement) -> _Verdict:
    if judgement.refusal is not None:
        message = "; ".join(
            f"{e.path}: {e.message}" + (f" (got {e.value})" if e.value else "") for e in judgement.refusal.errors
        )
        return _Verdict("RuntimeResolved", "False", judgement.refusal.reason, message)
    if judgement.apply_error:
        return _Verdict("RuntimeResolved", "False", "ApplyFailed", judgement.apply_error)
    plan = judgement.plan
    warnings = "; ".join(plan.warnings) if plan else ""
    return _Verdict("RuntimeResolved", "True", "Selected", warnings)


def _scheduled(judgement: Judgement, fault: Fault | None) -> _Verdict:
    if fault is not None and fault.condition == "PodsScheduled":
        return _Verdict("PodsScheduled", "False", fault.reason, fault.message)
    if judgement.plan is not None and judgement.plan.waiting_for:
        return _Verdict("PodsScheduled", "Unknown", "WaitingForModelCache", judgement.plan.waiting_for)
    counted = [p for p in judgement.observation.pods if p.counts]
    waiting = [p for p in counted if not p.scheduled]
    if waiting:
        return _Verdict("PodsScheduled", "Unknown", "Scheduling", f"{len(waiting)} pods wait for a node")
    if not counted:
        return _Verdict("PodsScheduled", "Unknown", "NoPods", "no pod exists")
    return _Verdict("PodsScheduled", "True", "Scheduled")


def _model_ready(judgement: Judgement, fault: Fault | None) -> _Verdict:
    if fault is not None and fault.condition == "ModelReady" and not judgement.observation.ready:
        return _Verdict("ModelReady", "False", fault.reason, fault.message)
    if judgement.observation.ready:
        return _Verdict("ModelReady", "True", "Loaded")
    if judgement.plan is not None and judgement.plan.waiting_for:
        return _Verdict("ModelReady", "False", "WaitingForModelCache", judgement.plan.waiting_for)
    if any(p.counts and p.scheduled for p in judgement.observation.pods):
        return _Verdict("ModelReady", "Unknown", "Loading", "the engine starts and loads the model")
    return _Verdict("ModelReady", "Unknown", "NoReplica", "no replica runs")


def _progressing(judgement: Judgement) -> _Verdict:
    deployment = judgement.observation.deployment
    if deployment is None:
        return _Verdict("Progressing", "Unknown", "NotCreated")
    if deployment.deadline_exceeded:
        message = "no progress within spec.rollout.progressDeadlineSeconds; the old replicas serve on"
        return _Verdict("Progressing", "False", "DeadlineExceeded", message)
    if deployment.rolling:
        return _Verdict("Progressing", "True", "RollingOut", f"{deployment.updated} of {deployment.wanted} are new")
    return _Verdict("Progressing", "False", "Complete")


def _scaling_active(judgement: Judgement, previous: Mapping[str, Any]) -> _Verdict:
    decision, plan = judgement.decision, judgement.plan
    if plan is None or not plan.workloads or not plan.workloads[0].scaling.scales:
        return _Verdict("ScalingActive", "False", "NotAutoscaled", "the number of replicas is set elsewhere")
    if decision is None:  # the operator has just started: what was said before still holds
        last = next((c for c in previous.get("conditions") or [] if c["type"] == "ScalingActive"), None)
        if last is not None:
            return _Verdict("ScalingActive", last["status"], last["reason"], last["message"])
        return _Verdict("ScalingActive", "Unknown", "NoDecisionYet")
    if decision.frozen:
        message = f"{decision.stale} of {decision.ready} replicas give no fresh metrics; the number is kept"
        return _Verdict("ScalingActive", "False", "MetricsStale", message)
    if decision.guard == "Unschedulable":
        return _Verdict("ScalingActive", "False", "Unschedulable", "more replicas are needed but find no node")
    return _Verdict("ScalingActive", "True", "MetricsFresh")


def _degraded(judgement: Judgement, fault: Fault | None) -> _Verdict:
    ready, needed = len(judgement.observation.ready), _needed(judgement)
    if fault is not None and judgement.observation.ready:
        return _Verdict("Degraded", "True", fault.reason, fault.message)
    if judgement.refusal is not None and judgement.observation.ready:
        return _Verdict("Degraded", "True", judgement.refusal.reason, "replicas of the former spec serve on")
    if ready and ready < needed:
        return _Verdict("Degraded", "True", "FewerThanMinimum", f"{ready} of {needed} replicas answer requests")
    return _Verdict("Degraded", "False", "AsExpected")


def _model(judgement: Judgement) -> dict[str, Any]:
    observation = judgement.observation
    fault = find_fault(observation)
    model: dict[str, Any] = {"state": "Pending"}
    if observation.ready:
        model["state"] = "Loaded"
    elif fault is not None and fault.condition == "ModelReady":
        model["state"] = "Failed"
    elif any(p.counts and p.scheduled for p in observation.pods):
        model["state"] = "Loading"
    if judgement.service.spec.model.revision:
        model["revision"] = judgement.service.spec.model.revision
    times = start_seconds(observation.pods)
    if times:
        model["loadSecondsP50"] = round(median(times))
    failed = [p for p in observation.pods if p.exit_code not in (None, 0)]
    if failed:
        latest = max(failed, key=lambda p: p.created_at)
        model["lastFailure"] = last_line(latest.exit_message) or latest.exit_reason or f"exit code {latest.exit_code}"
    return model


def start_seconds(pods: Sequence[PodView]) -> list[float]:
    """Seconds from the creation of each ready pod to its readiness; pods that restarted tell nothing."""
    return [p.ready_at - p.created_at for p in pods if p.ready_at is not None and p.restarts == 0]


def _scaling(judgement: Judgement, decision: Decision, before: Mapping[str, Any]) -> dict[str, Any]:
    told = [
        {"time": timestamp(s.time), "from": s.before, "to": s.after, "reason": s.reason[:256]}
        for s in judgement.scalings
    ]
    history = [*told, *(event for event in before.get("history") or [] if event not in told)][:HISTORY_LENGTH]
    scaling: dict[str, Any] = {
        "queueDepth": round(decision.waiting + decision.held),
        "decision": _decision(decision),
        "learned": decision.history.persisted(),
        "history": history,
    }
    if decision.kv_utilization is not None:
        scaling["kvUtilization"] = f"{decision.kv_utilization:.2f}"
    if history:
        scaling["lastScaleTime"] = history[0]["time"]
    return scaling


def _decision(decision: Decision) -> dict[str, Any]:
    values = {
        "demand": f"{decision.replicas_worth:.2f}",
        "kvDesired": decision.kv_desired,
        "loadDesired": decision.load_desired,
        "queueDesired": decision.queue_desired,
        "sloDesired": decision.slo_desired,
        "ready": decision.ready,
        "pending": decision.pending,
        "stale": decision.stale,
        "waiting": round(decision.waiting) + decision.held,
        "running": round(decision.running),
        "reason": decision.reason.value,
        "guard": decision.guard.value,
        "message": decision.message[:MAX_MESSAGE],
    }
    return {name: value for name, value in values.items() if value not in (None, "")}


def _previous(service: InferenceService) -> Mapping[str, Any]:
    if service.status is None:
        return {}
    return service.status.model_dump(by_alias=True, exclude_none=True, mode="json")


def _newsworthy(status: Mapping[str, Any]) -> dict[str, Any]:
    scaling = {k: v for k, v in (status.get("scaling") or {}).items() if k in ("history", "lastScaleTime")}
    rest = {k: v for k, v in status.items() if k != "scaling" and v not in (None, [], {}, "")}
    return {**rest, "scaling": scaling}
