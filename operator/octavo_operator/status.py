"""service_status: conditions and numbers from what is observed, never from what was intended. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from octavo_operator.adapters import AdapterView
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.operations import Canary
from octavo_operator.autoscale.decide import Decision
from octavo_operator.canary import Phase, Trial, canary_weight
from octavo_operator.conditions import MAX_MESSAGE, service_conditions
from octavo_operator.faults import find_fault, last_line
from octavo_operator.judgement import Judgement, timestamp
from octavo_operator.observation import PodView, seconds
from octavo_operator.plan.values import ModelFacts
from octavo_operator.render.labels import SERVICE_LABEL

HISTORY_LENGTH = 10
MAX_REVISIONS = 16

Status = dict[str, Any]


def service_status(judgement: Judgement) -> Status:
    """The status of a service; fields that are not known are left out. Times move only when what they tell moves."""
    service, observation, plan = judgement.service, judgement.observation, judgement.plan
    previous = judgement.previous()
    deployment, canary = observation.deployment, observation.canary
    status: Status = {
        "observedGeneration": service.metadata.generation,
        "replicas": sum(view.replicas for view in (deployment, canary) if view),
        "readyReplicas": len(observation.ready),
        "desiredReplicas": _desired(judgement),
        "updatedReplicas": newest.updated if (newest := canary or deployment) else 0,
        "selector": f"{SERVICE_LABEL}={service.name}",
        "conditions": service_conditions(judgement, previous),
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
    if (trial := judgement.trial) is not None and service.spec.rollout.canary is not None:
        status["canary"] = _canary(trial, service.spec.rollout.canary)
    if judgement.adapters:
        status["adapters"] = [_adapter(view) for view in judgement.adapters]
    elif judgement.adapters is None and previous.get("adapters"):
        status["adapters"] = [{k: v for k, v in adapter.items() if v != ""} for adapter in previous["adapters"]]
    if revisions := _revisions(judgement):
        status["revisions"] = revisions
    if capacity := judgement.known_capacity():
        status["capacity"] = capacity
    return status


def without_change(old: Mapping[str, Any] | None, new: Status) -> bool:
    """Whether the status says nothing new; the numbers of the last decision alone are no news."""
    return old is not None and _newsworthy(old) == _newsworthy(new)


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
    elif judgement.plan is not None and judgement.plan.waiting_for:
        model["state"] = "Downloading"
    model |= _stored(judgement)
    times = start_seconds(observation.pods)
    if times:
        model["loadSecondsP50"] = round(median(times))
    failed = [p for p in observation.pods if p.exit_code not in (None, 0)]
    if failed:
        latest = max(failed, key=lambda p: p.created_at)
        model["lastFailure"] = last_line(latest.exit_message) or latest.exit_reason or f"exit code {latest.exit_code}"
    return model


def _stored(judgement: Judgement) -> dict[str, Any]:
    """Commit and size of the stored model: as the hub told them, else as they were told of this very spec."""
    facts = judgement.plan.model if judgement.plan else ModelFacts()
    before = judgement.previous()
    same_spec = before.get("observedGeneration") == judgement.service.metadata.generation
    known = (before.get("model") or {}) if same_spec else {}
    written = judgement.service.spec.model.revision or ""
    stored = {
        "revision": facts.revision or known.get("revision") or written,
        "bytesTotal": facts.shape.weight_bytes if facts.shape else known.get("bytesTotal"),
    }
    return {name: value for name, value in stored.items() if value}


def start_seconds(pods: Sequence[PodView]) -> list[float]:
    """Seconds from the creation of each ready pod to its readiness; pods that restarted tell nothing."""
    return [p.ready_at - p.created_at for p in pods if p.ready_at is not None and p.restarts == 0]


def _adapter(view: AdapterView) -> dict[str, Any]:
    entry = {"name": view.name, "state": view.state.value, "readyReplicas": view.ready_replicas}
    return {**entry, "message": view.message[:MAX_MESSAGE]} if view.message else entry


def _desired(judgement: Judgement) -> int:
    deployment = judgement.observation.deployment
    if judgement.trial is not None and judgement.wanted is not None:
        return judgement.wanted
    return deployment.wanted if deployment else 0


def _canary(trial: Trial, canary: Canary) -> dict[str, Any]:
    entry = {
        "revision": trial.revision,
        "phase": trial.phase.value,
        "step": trial.step,
        "weight": canary_weight(trial, canary),
        "since": timestamp(trial.since),
    }
    return {**entry, "message": trial.failing[:MAX_MESSAGE]} if trial.failing else entry


def restored_trial(service: InferenceService) -> Trial | None:
    """The trial that the last status told of."""
    told = service.status.canary if service.status else None
    if told is None or told.phase not in set(Phase):  # of another version of the operator
        return None
    return Trial(told.revision, Phase(told.phase), told.step, seconds(told.since) or 0.0, told.message)


def _revisions(judgement: Judgement) -> list[dict[str, Any]]:
    """Revisions that have pods, by the name of their ReplicaSet, with the percent of requests that each gets."""
    pods = [pod for pod in judgement.observation.pods if pod.counts and pod.template_hash]
    canary = judgement.service.spec.rollout.canary
    weight = canary_weight(judgement.trial, canary) if judgement.trial and canary else 0
    shares = {True: weight, False: 100 - weight}  # by whether a pod is on trial
    revisions = []
    for template_hash, on_trial in sorted({(pod.template_hash, pod.canary) for pod in pods}):
        serving = sum(pod.ready for pod in pods if pod.template_hash == template_hash)
        of_track = sum(pod.ready for pod in pods if pod.canary == on_trial)
        share = round(shares[on_trial] * serving / of_track) if of_track else 0
        name = f"{judgement.service.name}-{template_hash}"
        revisions.append({"name": name, "weight": share, "readyReplicas": serving})
    return revisions[:MAX_REVISIONS]


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


def _newsworthy(status: Mapping[str, Any]) -> dict[str, Any]:
    """The status without the numbers that always move."""
    scaling = {k: v for k, v in (status.get("scaling") or {}).items() if k in ("history", "lastScaleTime")}
    capacity = {k: v for k, v in (status.get("capacity") or {}).items() if k != "peakTokensPerMinute"}
    rest = {k: v for k, v in status.items() if k not in ("scaling", "capacity") and v not in (None, [], {}, "")}
    return {**rest, "scaling": scaling, "capacity": capacity}
