"""review: whether the API server should take an InferenceService. The same checks as `octavo render`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo_operator.api.errors import FieldError, ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.desired import Runtime, plan_service
from octavo_operator.plan import Facts, Unplannable
from octavo_operator.render import render_plan

API_VERSION = "admission.k8s.io/v1"
MAX_WARNING = 256  # the API server cuts longer ones off


@dataclass(frozen=True)
class Verdict:
    """Whether it is taken; `message` says why not, all reasons at once, `warnings` what to think of anyway."""

    allowed: bool
    message: str = ""
    warnings: tuple[str, ...] = ()


def concerns_spec(request: Mapping[str, Any]) -> bool:
    """Whether the request changes what is wanted: labels, finalizers and the like are never held up."""
    old, new = request.get("oldObject") or {}, request.get("object") or {}
    return request.get("operation") in ("CREATE", "UPDATE") and old.get("spec") != new.get("spec")


def review(document: Mapping[str, Any], runtimes: Iterable[Runtime], facts: Facts) -> Verdict:
    """The verdict on an InferenceService, given the runtimes it may use and what is known of its model."""
    try:
        service = parse(InferenceService, document)
        plan = plan_service(service, runtimes, facts)
        render_plan(plan)  # refuses what a pod template may not do, a grace period below the drain among it
    except ManifestErrors as wrong:
        return Verdict(False, _told(wrong.errors))
    except Unplannable as wrong:
        return Verdict(False, _told(wrong.errors))
    if plan.fit is not None and not plan.fit.fits:
        return Verdict(False, f"the model does not fit its accelerator: {plan.fit.message}")
    warnings = (*plan.warnings, *((plan.waiting_for,) if plan.waiting_for else ()))
    return Verdict(True, warnings=tuple(text[:MAX_WARNING] for text in warnings))


def answer(request: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The AdmissionReview that answers a request."""
    response: dict[str, Any] = {"uid": request["uid"], "allowed": verdict.allowed}
    if verdict.message:
        response["status"] = {"code": 422, "reason": "Invalid", "message": verdict.message}
    if verdict.warnings:
        response["warnings"] = list(verdict.warnings)
    return {"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response}


def _told(errors: Iterable[FieldError]) -> str:
    return "; ".join(str(error) for error in errors)
