"""cache_status: how far the download of a ModelCache is, from its Job, claim and pods. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from octavo_operator.api.model_cache import ModelCache
from octavo_operator.faults import Fault, find_fault, last_line
from octavo_operator.judgement import timestamp
from octavo_operator.observation import Observation, PodView, pod_view, seconds
from octavo_operator.render.model_cache import DOWNLOAD_CONTAINER, claim_name, model_path

Raw = Mapping[str, Any]


def cache_status(
    cache: ModelCache, job: Raw | None, claim: Raw | None, pods: Iterable[Raw], now: float
) -> dict[str, Any]:
    """The status of a cache."""
    phase, reason, message = _phase(job, claim, [pod_view(pod, DOWNLOAD_CONTAINER) for pod in pods])
    ready = "True" if phase == "Ready" else "False"
    before = {c.type: c for c in cache.status.conditions} if cache.status else {}
    old = before.get("Ready")
    since = old.last_transition_time if old is not None and old.status.value == ready else timestamp(now)
    status: dict[str, Any] = {
        "observedGeneration": cache.metadata.generation,
        "phase": phase,
        "claimName": claim_name(cache),
        "path": model_path(cache),
        "conditions": [
            {
                "type": "Ready",
                "status": ready,
                "reason": reason,
                "message": message,
                "observedGeneration": cache.metadata.generation,
                "lastTransitionTime": since,
            }
        ],
    }
    finished = (job or {}).get("status", {}).get("completionTime")
    if finished:
        status["completionTime"] = finished
    return status


def failed_at(job: Raw) -> float | None:
    """When a Job gave up, in Unix seconds; None if it did not."""
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Failed" and condition["status"] == "True":
            return seconds(condition.get("lastTransitionTime"))
    return None


def _phase(job: Raw | None, claim: Raw | None, pods: list[PodView]) -> tuple[str, str, str]:
    """(phase, reason, message)."""
    status = (job or {}).get("status") or {}
    if any(c["type"] == "Complete" and c["status"] == "True" for c in status.get("conditions") or []):
        return "Ready", "Downloaded", ""
    fault: Fault | None = find_fault(Observation(None, tuple(pods)))
    line = next((last_line(p.exit_message) for p in pods if p.exit_message), "")
    if job is not None and failed_at(job) is not None:
        if fault is not None:
            return "Failed", fault.reason, fault.message
        return "Failed", "DownloadFailed", line or "the download failed; see the logs of its Job"
    if fault is not None:
        return "Downloading", fault.reason, fault.message
    if claim is not None and (claim.get("status") or {}).get("phase") == "Lost":
        return "Failed", "ClaimLost", "the volume of the claim is gone; delete the claim to begin anew"
    if any(p.phase == "Running" for p in pods):
        return "Downloading", "Downloading", line
    return "Pending", "WaitingForPod", "the download waits for a volume and a node"
