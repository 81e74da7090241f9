"""What is wrong with a replica, in one word for programs and one sentence with the next step for people. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from octavo_operator.observation import DeploymentView, Observation, PodView

MAX_LINE = 300


@dataclass(frozen=True)
class Fault:
    """A reason and a message. `condition` is the aspect it belongs to."""

    condition: str
    reason: str
    message: str


def find_fault(observation: Observation) -> Fault | None:
    """The fault that keeps the service from its wanted replicas, the most telling one first; None if there is none."""
    if observation.deployment is not None and observation.deployment.failure_message:
        return _creation_fault(observation.deployment)
    members = (*observation.pods, *observation.workers)
    pods = [pod for pod in members if pod.counts and not pod.ready]
    for find in (_scheduling_fault, _image_fault, _engine_fault, _probe_fault):
        for pod in pods:
            fault = find(pod)
            if fault is not None:
                return fault
    return None


def _creation_fault(deployment: DeploymentView) -> Fault:
    message = deployment.failure_message
    if "exceeded quota" in message:
        return Fault("PodsScheduled", "QuotaExceeded", f"{message}; raise the ResourceQuota or ask for less")
    if "violates PodSecurity" in message:
        hint = "the namespace's Pod Security level refuses the pod; remove the offending part of spec.podTemplate"
        return Fault("PodsScheduled", "PodSecurityViolation", f"{message}; {hint}")
    if "admission webhook" in message or "failed calling webhook" in message:
        return Fault("PodsScheduled", "AdmissionRefused", f"{message}; see the webhook's owner")
    return Fault("PodsScheduled", deployment.failure_reason or "FailedCreate", message)


_GPU = re.compile(r"Insufficient (?:\S+/)?(?:gpu|mig-\S+|npu)", re.IGNORECASE)


def _scheduling_fault(pod: PodView) -> Fault | None:
    message = pod.unscheduled_message
    if not message:
        return None
    if _GPU.search(message):
        return Fault(
            "PodsScheduled", "InsufficientGPU", f"{message}; add GPU nodes or lower spec.autoscaling.maxReplicas"
        )
    if "Insufficient" in message:
        return Fault(
            "PodsScheduled", "InsufficientResources", f"{message}; add nodes or ask for less in spec.resources"
        )
    if "untolerated taint" in message:
        return Fault("PodsScheduled", "UntoleratedTaint", f"{message}; add spec.scheduling.tolerations")
    if "node affinity" in message or "selector" in message:
        hint = "check spec.scheduling.nodeSelector and spec.accelerator.type against the nodes' labels"
        return Fault("PodsScheduled", "NoMatchingNode", f"{message}; {hint}")
    if "persistentvolumeclaim" in message.lower() or "volume" in message.lower():
        return Fault("PodsScheduled", "VolumeNotBound", f"{message}; check the claim and its StorageClass")
    return Fault("PodsScheduled", "Unschedulable", message)


def _image_fault(pod: PodView) -> Fault | None:
    if pod.waiting_reason in ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"):
        hint = "check the runtime's image and its pull secret"
        return Fault(
            "ModelReady", "ImagePullFailed", f"{pod.name}: {pod.waiting_message or pod.waiting_reason}; {hint}"
        )
    if pod.waiting_reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        hint = "check that the Secrets and ConfigMaps it refers to exist"
        message = f"{pod.name}: {pod.waiting_message or pod.waiting_reason}; {hint}"
        return Fault("ModelReady", "ContainerConfigError", message)
    return None


# What engines and hubs print, and what it means. The first match counts.
_LOG_FAULTS: tuple[tuple[str, str, str], ...] = (
    (r"\b401\b|unauthorized|invalid token", "ModelUnauthorized", "check spec.model.credentialsSecretRef"),
    (r"\b403\b|forbidden|gated repo", "ModelForbidden", "ask for access to the model, or use another token"),
    (r"\b429\b|too many requests|rate limit", "ModelRateLimited", "make a ModelCache, which downloads once"),
    (r"\b404\b|not found|no such (file|model|repo)|does not exist", "ModelNotFound",
     "check spec.model.storageUri and spec.model.revision"),
    (r"out of memory|do(es)? not fit|not enough memory|no room for|kv cache.*(small|memory)", "DoesNotFit",
     "lower spec.model.maxModelLen, quantize, or ask for more memory"),
    (r"quantiz", "QuantizationUnsupported", "choose another spec.model.quantization"),
    (r"unsupported (architecture|model)|unknown architecture", "ModelUnsupported", "choose another runtime or model"),
    (r"no such option|unrecognized arguments|unexpected argument", "BadArguments", "check spec.engine.extraArgs"),
    (r"name resolution|connection refused|network is unreachable|timed out", "ModelUnreachable",
     "check the network policy and the storage's address"),
)  # fmt: skip


def _engine_fault(pod: PodView) -> Fault | None:
    if pod.exit_code is None or (pod.exit_code == 0 and not pod.failing):
        return None
    line = last_line(pod.exit_message)
    if pod.exit_reason == "OOMKilled":
        hint = "raise spec.resources.limits.memory or lower spec.engine.kvCacheMemory"
        return Fault("ModelReady", "OOMKilled", f"{pod.name} used more memory than its limit; {hint}")
    told = meaning_of(pod.exit_message)
    if told is not None:
        reason, hint = told
        return Fault("ModelReady", reason, f"{pod.name}: {line}; {hint}")
    times = f"ended {pod.restarts} times" if pod.restarts > 1 else "ended"
    if pod.exit_code in (137, 143) and not line:
        hint = "it was killed; see its events for failed probes and spec.runtime's startup time"
        return Fault("ModelReady", "EngineKilled", f"{pod.name} {times} with exit code {pod.exit_code}; {hint}")
    log_line = f": {line}" if line else ""
    hint = f"see kubectl logs {pod.name} --previous"
    return Fault("ModelReady", "CrashLoop", f"{pod.name} {times} with exit code {pod.exit_code}{log_line}; {hint}")


def _probe_fault(pod: PodView) -> Fault | None:
    if pod.phase == "Running" and pod.started and not pod.ready:
        message = f"{pod.name} runs but its readiness probe fails; see kubectl describe pod {pod.name}"
        return Fault("ModelReady", "ReadinessProbeFailed", message)
    return None


def meaning_of(log: str) -> tuple[str, str] | None:
    """(reason, hint) of what an engine said before it ended, where that is known."""
    found = (item for item in _LOG_FAULTS if re.search(item[0], log, re.IGNORECASE))
    return next(((reason, hint) for _, reason, hint in found), None)


def last_line(text: str) -> str:
    """The last line of a log that says something, shortened."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MAX_LINE] if lines else ""
