"""The fields that make no sense on one machine, as one declared list; `octavo up` refuses them by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo_operator.api.autoscaling import ScalingMode
from octavo_operator.api.errors import FieldError
from octavo_operator.api.inference_service import InferenceService, InferenceServiceSpec
from octavo_operator.api.operations import Scheduling

_VOLUMES = ("pvc://", "oci://")
_Read = Callable[[InferenceServiceSpec], Any]


def local_refusals(service: InferenceService) -> list[FieldError]:
    """An error for every field that is set and that local mode cannot honour."""
    errors = []
    for path, read, why in _CLUSTER_FIELDS:
        if read(service.spec):
            errors.append(FieldError(f"spec.{path}", f"works on a cluster only: {why}"))
    for index, variable in enumerate(service.spec.engine.env):
        if variable.value_from is not None:
            path = f"spec.engine.env[{index}].valueFrom"
            message = f"works on a cluster only: give a value, or set {variable.name} in your shell"
            errors.append(FieldError(path, message))
    return errors


def _other_runtime(spec: InferenceServiceSpec) -> bool:
    return spec.runtime is not None and spec.runtime.name != "octavo"


def _external(spec: InferenceServiceSpec) -> bool:
    return spec.autoscaling is not None and spec.autoscaling.mode is ScalingMode.EXTERNAL


_CLUSTER_FIELDS: tuple[tuple[str, _Read, str], ...] = (
    ("runtime.name", _other_runtime, "this machine runs Octavo's own engine"),
    (
        "model.storageUri",
        lambda s: s.model.storage_uri.startswith(_VOLUMES),
        "use file:// or another address",
    ),
    (
        "model.adapters",
        lambda s: any(a.storage_uri.startswith(_VOLUMES) for a in (s.model.adapters.items if s.model.adapters else ())),
        "use file:// or another address for each",
    ),
    ("model.cacheRef", lambda s: s.model.cache_ref, "downloads are cached under ~/.cache/octavo anyway"),
    ("model.credentialsSecretRef", lambda s: s.model.credentials_secret_ref, "set HF_TOKEN in your shell"),
    ("accelerator", lambda s: s.accelerator, "nodes are chosen by the scheduler"),
    ("parallelism.pipeline", lambda s: s.parallelism.pipeline > 1, "a replica is one process here"),
    ("parallelism.data", lambda s: s.parallelism.data > 1, "a replica is one process here"),
    ("parallelism.nodes", lambda s: (s.parallelism.nodes or 1) > 1, "there is one machine"),
    ("autoscaling.mode", _external, "no HPA runs here; use Internal"),
    ("rollout.canary", lambda s: s.rollout.canary, "edit the manifest and start again"),
    ("scheduling", lambda s: s.scheduling != Scheduling(), "there is one machine"),
    ("podTemplate", lambda s: s.pod_template, "there are no pods"),
    ("observability.podMonitor", lambda s: s.observability.pod_monitor, "scrape the gateway's /metrics"),
)
