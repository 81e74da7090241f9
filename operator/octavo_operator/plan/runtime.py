"""Choose the runtime of a service, check that it can do what is asked, and find its image."""

from __future__ import annotations

from collections.abc import Iterable

from octavo_operator.api.errors import FieldError
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.model import KVCacheQuantization, ModelFormat, WeightQuantization
from octavo_operator.api.serving_runtime import (
    AdapterSupport,
    ClusterServingRuntime,
    ServingRuntime,
    ServingRuntimeSpec,
)
from octavo_operator.plan.values import Facts, Resources, Unplannable

Runtime = ServingRuntime | ClusterServingRuntime


def choose_runtime(service: InferenceService, runtimes: Iterable[Runtime]) -> Runtime:
    """The runtime that the service names, or the one of highest priority that loads its format by itself.

    A namespace's own runtimes win over the cluster's; ties go to the smaller name. Raises `Unplannable`.
    """
    candidates = [r for r in runtimes if r.kind != "ServingRuntime" or r.metadata.namespace == service.namespace]
    wanted = service.spec.runtime
    if wanted is not None:
        for runtime in candidates:
            if runtime.metadata.name == wanted.name and runtime.kind == wanted.kind.value:
                return runtime
        known = ", ".join(sorted(r.metadata.name for r in candidates if r.kind == wanted.kind.value)) or "none"
        message = f"no {wanted.kind.value} has this name; there are: {known}"
        raise Unplannable("RuntimeNotFound", [FieldError("spec.runtime.name", message, repr(wanted.name))])
    fitting = [(_rank(service, runtime), runtime) for runtime in candidates]
    ranked = [(rank, runtime) for rank, runtime in fitting if rank is not None]
    if not ranked:
        message = f"no runtime loads {model_format(service).value} by itself; name one in spec.runtime"
        raise Unplannable("NoRuntimeForFormat", [FieldError("spec.model.format", message)])
    return min(ranked, key=lambda entry: entry[0])[1]


def _rank(service: InferenceService, runtime: Runtime) -> tuple[bool, int, str] | None:
    spec = runtime.spec
    if spec.disabled or service.spec.model.task not in spec.supports.tasks:
        return None
    wanted = model_format(service)
    priorities = [f.priority for f in spec.supported_model_formats if f.auto_select and f.name is wanted]
    if not priorities:
        return None
    return (runtime.kind != "ServingRuntime", -max(priorities), runtime.metadata.name)


def model_format(service: InferenceService) -> ModelFormat:
    """The format that is given, or what the address tells; safetensors otherwise."""
    model = service.spec.model
    if model.format is not None:
        return model.format.name
    address = model.storage_uri.lower()
    endings = {".gguf": ModelFormat.GGUF, ".onnx": ModelFormat.ONNX, ".pt": ModelFormat.TORCHSCRIPT}
    found = next((fmt for ending, fmt in endings.items() if address.endswith(ending)), None)
    return found or (ModelFormat.GGUF if "gguf" in address else ModelFormat.SAFETENSORS)


def check_support(service: InferenceService, runtime: ServingRuntimeSpec, resources: Resources) -> list[FieldError]:
    """An error for everything the service asks that the runtime cannot do."""
    model, supports = service.spec.model, runtime.supports
    errors = []
    formats = {f.name for f in runtime.supported_model_formats}
    if model_format(service) not in formats:
        errors.append(_unsupported("spec.model.format", model_format(service).value, sorted(formats)))
    if model.task not in supports.tasks:
        errors.append(_unsupported("spec.model.task", model.task.value, supports.tasks))
    weights = model.quantization.weights
    if weights not in (WeightQuantization.AUTO, WeightQuantization.NONE, *supports.quantization):
        errors.append(_unsupported("spec.model.quantization.weights", weights.value, supports.quantization))
    cache = model.quantization.kv_cache
    if cache not in (KVCacheQuantization.AUTO, KVCacheQuantization.NONE, *supports.kv_cache_quantization):
        errors.append(_unsupported("spec.model.quantization.kvCache", cache.value, supports.kv_cache_quantization))
    if model.adapters is not None and model.adapters.items and supports.adapters is AdapterSupport.NONE:
        errors.append(FieldError("spec.model.adapters", "this runtime serves no LoRA adapters"))
    if not supports.cpu and resources.accelerator is None:
        message = "this runtime needs an accelerator, such as nvidia.com/gpu"
        errors.append(FieldError("spec.resources.limits", message))
    return errors


def replica_nodes(
    service: InferenceService, runtime: ServingRuntimeSpec, resources: Resources
) -> tuple[int, list[FieldError]]:
    """Nodes of one replica: as written, else as many as its accelerators need; and why there cannot be so many."""
    written = service.spec.parallelism
    ranks, each = written.tensor * written.pipeline * written.data, resources.accelerators
    nodes = written.nodes or (-(-ranks // each) if each else 1)
    if nodes == 1:
        return 1, []
    errors = []
    if ranks % nodes:
        message = f"{ranks} ranks (tensor x pipeline x data) do not divide over {nodes} nodes"
        errors.append(FieldError("spec.parallelism", message))
    elif each and ranks != nodes * each:
        message = (
            f"{ranks} ranks on {nodes} nodes need {ranks // nodes} accelerators per node, and spec.resources has {each}"
        )
        errors.append(FieldError("spec.parallelism", message))
    if not runtime.supports.multi_node:
        errors.append(
            FieldError("spec.parallelism", f"this runtime runs on one node; a replica of {nodes} is too large")
        )
    if service.spec.rollout.canary is not None:
        message = "a canary of replicas that span nodes is not supported"
        errors.append(FieldError("spec.rollout.canary", message))
    return nodes, errors


def image_of(runtime: ServingRuntimeSpec, resources: Resources, facts: Facts) -> str:
    """The runtime's image for the device; the release's own image for Octavo's engine."""
    image = runtime.container.image
    if runtime.engine == "octavo" and facts.engine_image:
        image = facts.engine_image
    device = resources.accelerator or "cpu"
    variant = next((v for v in runtime.accelerators if v.resource == device), None)
    if variant is None:
        return image
    if variant.image:
        return variant.image
    return image if "@" in image else f"{image}{variant.image_suffix}"


def _unsupported(path: str, value: str, known: Iterable[str]) -> FieldError:
    return FieldError(path, f"this runtime knows only {', '.join(known) or 'the default'}", repr(value))
