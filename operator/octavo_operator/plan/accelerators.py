"""What is known of accelerators by their product's name, and what they cannot do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octavo_operator.api.errors import FieldError
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.quantity import parse_quantity
from octavo_operator.plan.values import Resources

GIB = 1024**3


@dataclass(frozen=True)
class Product:
    """One GPU: memory in GiB, as its data sheet says, and CUDA compute capability."""

    name: str
    memory_gib: int
    capability: tuple[int, int]


# Data sheets and https://developer.nvidia.com/cuda-gpus. The first whose name appears in the node's label counts.
_PRODUCTS = (
    Product("GB200", 186, (10, 0)),
    Product("B300", 288, (10, 3)),
    Product("B200", 180, (10, 0)),
    Product("GH200", 96, (9, 0)),
    Product("H200", 141, (9, 0)),
    Product("H100-NVL", 94, (9, 0)),
    Product("H100", 80, (9, 0)),
    Product("H20", 96, (9, 0)),
    Product("RTX-PRO-6000", 96, (12, 0)),
    Product("RTX-5090", 32, (12, 0)),
    Product("RTX-6000-ADA", 48, (8, 9)),
    Product("RTX-4090", 24, (8, 9)),
    Product("L40S", 48, (8, 9)),
    Product("L40", 48, (8, 9)),
    Product("L4", 24, (8, 9)),
    Product("A100", 40, (8, 0)),
    Product("A10G", 24, (8, 6)),
    Product("A10", 24, (8, 6)),
    Product("A30", 24, (8, 0)),
    Product("A40", 48, (8, 6)),
    Product("A6000", 48, (8, 6)),
    Product("V100", 16, (7, 0)),
    Product("T4", 16, (7, 5)),
)
_NAMED_MEMORY = re.compile(r"(\d+)GB(?![A-Z])")
_PROFILE_MEMORY = re.compile(r"\.(\d+)gb")


def find_product(label: str) -> Product | None:
    """The product behind a node's label such as NVIDIA-A100-SXM4-80GB; None if it is not known."""
    text = label.upper().replace(" ", "-")
    for product in _PRODUCTS:
        if re.search(rf"(?<![A-Z0-9]){re.escape(product.name)}(?![0-9])", text):
            named = _NAMED_MEMORY.search(text)
            return Product(product.name, int(named[1]), product.capability) if named else product
    return None


def memory_per_rank(service: InferenceService, resources: Resources) -> int | None:
    """Bytes that one rank has: of an accelerator, or of the replica's memory limit on a CPU; None if not known."""
    accelerator = service.spec.accelerator
    if not resources.accelerator:
        limit = resources.limits.get("memory")
        return None if limit is None else int(parse_quantity(limit))
    if accelerator is not None and accelerator.partition is not None:
        profile = _PROFILE_MEMORY.search(accelerator.partition.profile)
        return int(profile[1]) * GIB if profile else None
    if accelerator is not None and accelerator.min_memory is not None:
        return int(parse_quantity(accelerator.min_memory))
    product = find_product(accelerator.type) if accelerator is not None and accelerator.type else None
    return None if product is None else product.memory_gib * GIB


@dataclass(frozen=True)
class _Need:
    """A setting that needs a compute capability. `engine` is empty where it holds for every engine."""

    path: str
    value: str
    capability: tuple[int, int]
    engine: str
    fix: str


_NEEDS = (
    _Need("model.quantization.kvCache", "FP8", (8, 9), "", "use Int8 where the runtime has it, or Auto"),
    _Need("model.dtype", "BFloat16", (8, 0), "", "use Float16"),
    _Need("model.quantization.weights", "FP8", (8, 0), "", "use Int8 or Int4"),
    _Need("accelerator.type", "", (8, 0), "octavo", "use another runtime, or a newer accelerator"),
)


def device_errors(service: InferenceService, engine: str) -> list[FieldError]:
    """An error for every setting that the accelerator, where its product is known, cannot compute."""
    accelerator, model = service.spec.accelerator, service.spec.model
    product = find_product(accelerator.type) if accelerator is not None and accelerator.type else None
    if product is None or accelerator is None:
        return []
    settings = {
        "model.quantization.kvCache": model.quantization.kv_cache.value,
        "model.quantization.weights": model.quantization.weights.value,
        "model.dtype": model.dtype.value,
    }
    errors = []
    for need in _NEEDS:
        asked = need.engine == engine if need.engine else settings[need.path] == need.value
        if asked and product.capability < need.capability:
            has, wants = (".".join(map(str, version)) for version in (product.capability, need.capability))
            message = f"{product.name} has compute capability {has}, and this needs {wants}; {need.fix}"
            errors.append(FieldError(f"spec.{need.path}", message, need.value or repr(accelerator.type)))
    return errors
