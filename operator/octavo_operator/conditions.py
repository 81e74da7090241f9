"""The conditions of a service, each judged from what is observed, with its reason and the next step. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo_operator.adapters import AdapterState
from octavo_operator.api.operations import Canary
from octavo_operator.canary import Phase, Trial, canary_weight
from octavo_operator.faults import Fault, find_fault
from octavo_operator.judgement import Judgement, timestamp

MAX_MESSAGE = 1_024


def service_conditions(judgement: Judgement, previous: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every condition, Ready first; a transition time moves only when the status does."""
    fault = find_fault(judgement.observation)
    verdicts = [
        _resolved(judgement),
        _fits(judgement, fault),
        _scheduled(judgement, fault),
        _model_ready(judgement, fault),
        _route_ready(judgement, previous),
        _adapters_ready(judgement, previous),
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
    by_type = {v.type: v for v in others}
    if by_type["RouteReady"].status == "False":  # its replicas may answer, but clients do not reach them
        return _Verdict("Ready", "False", by_type["RouteReady"].reason, by_type["RouteReady"].message)
    needed = _needed(judgement)
    if ready and ready >= needed:
        return _Verdict("Ready", "True", "MinimumReplicasAvailable", f"{ready} replicas answer requests")
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


def _fits(judgement: Judgement, fault: Fault | None) -> _Verdict:
    """What was seen counts; before anything ran, what can be computed."""
    if fault is not None and fault.reason in ("DoesNotFit", "OOMKilled"):
        return _Verdict("FitsAccelerator", "False", fault.reason, fault.message)
    capacity = judgement.known_capacity()
    if "kvTokensPerReplica" in capacity:
        held, at_once = capacity["kvTokensPerReplica"], capacity.get("maxConcurrencyAtMaxLen")
        requests = f", or {at_once} requests of full length" if at_once is not None else ""
        return _Verdict(
            "FitsAccelerator", "True", "Measured", f"the cache of a replica holds {held:,} tokens{requests}"
        )
    plan = judgement.plan
    if plan is not None and plan.fit is not None:
        status, reason = ("True", "Estimated") if plan.fit.fits else ("False", "DoesNotFit")
        return _Verdict("FitsAccelerator", status, reason, plan.fit.message)
    return _Verdict("FitsAccelerator", "Unknown", "NotEstimated", plan.not_estimated if plan else "")


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


def _route_ready(judgement: Judgement, previous: Mapping[str, Any]) -> _Verdict:
    route, model = judgement.route, judgement.service.model_name
    if route is None:  # the gateways were not asked yet: what was said before still holds
        return _before("RouteReady", previous) or _Verdict("RouteReady", "Unknown", "NotAskedYet")
    if route.taken_by:
        message = (
            f"model {model!r} is already served by namespace {route.taken_by}, and requests go there; "
            "set another spec.model.name"
        )
        return _Verdict("RouteReady", "False", "ModelNameTaken", message)
    if not route.gateways:
        if judgement.gateway_url:
            return _Verdict("RouteReady", "Unknown", "NoGateway", "no pod of the gateway exists")
        return _Verdict("RouteReady", "True", "ServiceOnly", "no gateway is installed; clients call the Service itself")
    if not route.answering:
        message = f"none of {route.gateways} gateways answers; see their pods and the network policy"
        return _Verdict("RouteReady", "Unknown", "GatewaySilent", message)
    if route.serving < route.answering:
        message = f"{route.serving} of {route.answering} gateways know the model"
        return _Verdict("RouteReady", "Unknown", "Publishing", message)
    return _Verdict("RouteReady", "True", "Published")


def _adapters_ready(judgement: Judgement, previous: Mapping[str, Any]) -> _Verdict:
    views = judgement.adapters
    if views is None and judgement.service.spec.model.adapters is not None:
        return _before("AdaptersReady", previous) or _Verdict("AdaptersReady", "Unknown", "NotAskedYet")
    if not views:
        return _Verdict("AdaptersReady", "True", "NoAdapters")
    failed = [view for view in views if view.state is AdapterState.FAILED]
    if failed:
        message = "; ".join(f"{view.name}: {view.message}" for view in failed)
        return _Verdict("AdaptersReady", "False", "AdapterFailed", f"{message}; the base model serves on")
    loading = [view.name for view in views if view.state is not AdapterState.LOADED]
    if not loading:
        return _Verdict("AdaptersReady", "True", "AllLoaded")
    if not judgement.observation.ready:
        return _Verdict("AdaptersReady", "Unknown", "NoReplica", "no replica runs that could load them")
    return _Verdict("AdaptersReady", "False", "Loading", f"not on every replica yet: {', '.join(loading)}")


def _progressing(judgement: Judgement) -> _Verdict:
    deployment = judgement.observation.deployment
    if deployment is None:
        return _Verdict("Progressing", "Unknown", "NotCreated")
    if judgement.trial is not None and judgement.service.spec.rollout.canary is not None:
        return _trial(judgement.trial, judgement.service.spec.rollout.canary)
    if deployment.deadline_exceeded:
        message = "no progress within spec.rollout.progressDeadlineSeconds; the old replicas serve on"
        return _Verdict("Progressing", "False", "DeadlineExceeded", message)
    if deployment.rolling:
        return _Verdict("Progressing", "True", "RollingOut", f"{deployment.updated} of {deployment.wanted} are new")
    return _Verdict("Progressing", "False", "Complete")


def _trial(trial: Trial, canary: Canary) -> _Verdict:
    share = f"revision {trial.revision} gets {canary_weight(trial, canary)} % of the requests"
    match trial.phase:
        case Phase.ROLLED_BACK:
            message = f"revision {trial.revision} was taken back: {trial.failing}; the former one serves on"
            return _Verdict("Progressing", "False", "CanaryRolledBack", message)
        case Phase.PROMOTING:
            return _Verdict("Progressing", "True", "CanaryPromoting", f"revision {trial.revision} takes over")
        case Phase.STARTING:
            share += "; the replicas of this step start"
    problem = f"; it does not go on: {trial.failing}" if trial.failing else ""
    return _Verdict("Progressing", "True", f"CanaryStep{trial.step + 1}", share + problem)


def _scaling_active(judgement: Judgement, previous: Mapping[str, Any]) -> _Verdict:
    decision, plan = judgement.decision, judgement.plan
    if plan is None or not plan.workloads or not plan.workloads[0].scaling.scales:
        return _Verdict("ScalingActive", "False", "NotAutoscaled", "the number of replicas is set elsewhere")
    if decision is None:  # the operator has just started: what was said before still holds
        return _before("ScalingActive", previous) or _Verdict("ScalingActive", "Unknown", "NoDecisionYet")
    if decision.frozen:
        message = f"{decision.stale} of {decision.ready} replicas give no fresh metrics; the number is kept"
        return _Verdict("ScalingActive", "False", "MetricsStale", message)
    if decision.guard == "Unschedulable":
        return _Verdict("ScalingActive", "False", "Unschedulable", "more replicas are needed but find no node")
    return _Verdict("ScalingActive", "True", "MetricsFresh")


def _degraded(judgement: Judgement, fault: Fault | None) -> _Verdict:
    ready, needed = len(judgement.observation.ready), _needed(judgement)
    trial = judgement.trial
    if trial is not None and trial.phase is Phase.ROLLED_BACK:
        message = f"{trial.failing}; change the spec, or remove spec.rollout.canary to roll it out nevertheless"
        return _Verdict("Degraded", "True", "CanaryRolledBack", message)
    if fault is not None and judgement.observation.ready:
        return _Verdict("Degraded", "True", fault.reason, fault.message)
    if judgement.refusal is not None and judgement.observation.ready:
        return _Verdict("Degraded", "True", judgement.refusal.reason, "replicas of the former spec serve on")
    if ready and ready < needed:
        return _Verdict("Degraded", "True", "FewerThanMinimum", f"{ready} of {needed} replicas answer requests")
    return _Verdict("Degraded", "False", "AsExpected")


def _before(type_: str, previous: Mapping[str, Any]) -> _Verdict | None:
    """What the last status said of a condition."""
    last = next((c for c in previous.get("conditions") or [] if c["type"] == type_), None)
    return None if last is None else _Verdict(type_, last["status"], last["reason"], last["message"])
