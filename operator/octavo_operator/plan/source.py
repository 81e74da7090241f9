"""Where a replica reads its model: what to pass to the engine, and which volume to mount."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_operator.api.errors import FieldError
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.serving_runtime import ServingRuntimeSpec
from octavo_operator.plan.values import ClaimMount, Facts, Target

CACHE_MOUNT = "/mnt/model-cache"
PVC_MOUNT = "/mnt/models"
MODEL_FIELD = "spec.model.storageUri"


@dataclass(frozen=True)
class ModelSource:
    """`uri` is what the engine is told; `waiting_for` says what must happen before it can be read."""

    uri: str
    claims: tuple[ClaimMount, ...] = ()
    takes_revision: bool = True
    waiting_for: str = ""


def model_source(
    service: InferenceService, runtime: ServingRuntimeSpec, facts: Facts
) -> tuple[ModelSource, list[FieldError]]:
    """The model's source for this runtime, and an error if the runtime cannot read it."""
    model = service.spec.model
    if model.cache_ref is not None:
        return _cached(model.cache_ref.name, facts), []
    return _source(model.storage_uri, MODEL_FIELD, runtime.model_source, facts)


def adapter_sources(
    service: InferenceService, runtime: ServingRuntimeSpec, facts: Facts
) -> tuple[dict[str, ModelSource], list[FieldError]]:
    """The source of each LoRA adapter by name, and an error for each that the runtime cannot read."""
    sources: dict[str, ModelSource] = {}
    errors: list[FieldError] = []
    adapters = service.spec.model.adapters
    kind = runtime.adapter_api.source or runtime.model_source
    if facts.target is Target.LOCAL:
        kind = "Uri"  # read by the engine as it starts, like the model
    for index, adapter in enumerate(adapters.items if adapters else []):
        path = f"spec.model.adapters.items[{index}].storageUri"
        sources[adapter.name], wrong = _source(adapter.storage_uri, path, kind, facts)
        errors += wrong
    return sources, errors


def _source(uri: str, field: str, kind: str, facts: Facts) -> tuple[ModelSource, list[FieldError]]:
    if uri.startswith("pvc://"):
        claim, _, path = uri.removeprefix("pvc://").partition("/")
        mount = f"{PVC_MOUNT}/{claim}"
        return ModelSource(f"{mount}/{path}".rstrip("/"), (ClaimMount(claim, mount),), takes_revision=False), []
    if uri.startswith("file://") and facts.target is Target.LOCAL:
        return ModelSource(uri, takes_revision=False), []
    if kind == "HuggingFaceId":
        if uri.startswith("hf://"):
            return ModelSource(uri.removeprefix("hf://")), []
        return ModelSource(uri), [_unreadable(field, "hf:// and pvc:// addresses", uri)]
    if kind == "Path":
        return ModelSource(uri), [_unreadable(field, "pvc:// addresses", uri)]
    return ModelSource(uri), []


def _cached(name: str, facts: Facts) -> ModelSource:
    claim = facts.model_claims.get(name)
    if claim is None:
        return ModelSource(CACHE_MOUNT, waiting_for=f"ModelCache {name} does not exist in this namespace")
    waiting = "" if claim.ready else f"ModelCache {name}: {claim.message or 'the download is not complete'}"
    path = f"{CACHE_MOUNT}/{claim.path}".rstrip("/")
    return ModelSource(path, (ClaimMount(claim.claim, CACHE_MOUNT),), takes_revision=False, waiting_for=waiting)


def _unreadable(field: str, readable: str, uri: str) -> FieldError:
    hint = (
        "for others make a ModelCache and name it in spec.model.cacheRef" if field == MODEL_FIELD else "copy it there"
    )
    return FieldError(field, f"this runtime reads {readable} only; {hint}", repr(uri))
