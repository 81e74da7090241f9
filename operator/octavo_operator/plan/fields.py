"""The portable fields of a service that runtimes map to flags, as a table: path below spec, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from octavo_operator.api.inference_service import InferenceService, InferenceServiceSpec
from octavo_operator.api.quantity import parse_quantity
from octavo_operator.plan.values import Resources

Value = str | int | bool | tuple[str, ...] | None
"""What a field says; None when it says nothing."""

DEVICE = "accelerator.device"  # derived from the resources, not written by users
NUM_THREADS = "engine.numThreads"

# Fields that a runtime may leave unmapped: pods, probes and the runtime's `supports` take care of them.
OPTIONAL = frozenset({DEVICE, NUM_THREADS, "model.task", "drain.propagationSeconds", "drain.timeoutSeconds"})


def portable_values(service: InferenceService, resources: Resources) -> dict[str, Value]:
    """The value of each portable field that the service sets, by path, in the order of the table."""
    values = {path: read(service.spec) for path, read in PORTABLE_FIELDS.items()}
    values[DEVICE] = _device(resources)
    if values[NUM_THREADS] is None:
        values[NUM_THREADS] = _threads(resources)
    return {path: value for path, value in values.items() if value is not None and value != ()}


def _unless(value: str, *words: str) -> str | None:
    return None if value in words else value


def _above_one(value: int) -> int | None:
    return value if value > 1 else None


def _amount(value: str | int | None) -> int | None:
    return None if value is None else int(parse_quantity(value))


def _device(resources: Resources) -> str | None:
    """The accelerator, or cpu when resources are given without one; nothing when none are given at all."""
    return resources.accelerator or ("cpu" if resources.limits or resources.requests else None)


def _threads(resources: Resources) -> int | None:
    """One thread per whole CPU of the limit, for engines that compute on the CPU: they cannot see the limit."""
    if resources.accelerator or "cpu" not in resources.limits:
        return None
    return max(1, math.floor(parse_quantity(resources.limits["cpu"])))


def _tracing_endpoint(spec: InferenceServiceSpec) -> str | None:
    tracing = spec.observability.tracing
    return tracing.endpoint if tracing else None


PORTABLE_FIELDS: Mapping[str, Callable[[InferenceServiceSpec], Value]] = MappingProxyType(
    {
        "model.aliases": lambda s: tuple(s.model.aliases),
        "model.revision": lambda s: s.model.revision,
        "model.task": lambda s: s.model.task.value,
        "model.maxModelLen": lambda s: s.model.max_model_len,
        "model.dtype": lambda s: _unless(s.model.dtype, "Auto"),
        "model.quantization.weights": lambda s: _unless(s.model.quantization.weights, "Auto"),
        "model.quantization.kvCache": lambda s: _unless(s.model.quantization.kv_cache, "Auto"),
        "model.speculative.draftStorageUri": lambda s: (
            s.model.speculative.draft_storage_uri if s.model.speculative else None
        ),
        "model.speculative.numTokens": lambda s: s.model.speculative.num_tokens if s.model.speculative else None,
        "model.adapters.maxLoaded": lambda s: s.model.adapters.max_loaded if s.model.adapters else None,
        "model.adapters.maxRank": lambda s: s.model.adapters.max_rank if s.model.adapters else None,
        DEVICE: lambda s: None,
        "parallelism.tensor": lambda s: _above_one(s.parallelism.tensor),
        "parallelism.pipeline": lambda s: _above_one(s.parallelism.pipeline),
        "parallelism.data": lambda s: _above_one(s.parallelism.data),
        "parallelism.expert": lambda s: s.parallelism.expert or None,
        "engine.maxNumSeqs": lambda s: s.engine.max_num_seqs,
        "engine.maxBatchedTokens": lambda s: s.engine.max_batched_tokens,
        "engine.maxPartialPrefills": lambda s: s.engine.max_partial_prefills,
        "engine.blockSize": lambda s: s.engine.block_size,
        "engine.numKvBlocks": lambda s: s.engine.num_kv_blocks,
        "engine.kvCacheMemory": lambda s: _amount(s.engine.kv_cache_memory),
        "engine.kvCacheMemoryFraction": lambda s: s.engine.kv_cache_memory_fraction,
        "engine.prefixCaching": lambda s: s.engine.prefix_caching,
        "engine.kvOffload.cpu": lambda s: _amount(s.engine.kv_offload.cpu) if s.engine.kv_offload else None,
        "engine.maxQueuedRequests": lambda s: s.engine.max_queued_requests,
        "engine.maxQueuedTokens": lambda s: s.engine.max_queued_tokens,
        NUM_THREADS: lambda s: s.engine.num_threads,
        "engine.seed": lambda s: s.engine.seed,
        "engine.logLevel": lambda s: s.engine.log_level,
        "routing.kvEvents": lambda s: s.routing.kv_events or None,
        "drain.propagationSeconds": lambda s: s.drain.propagation_seconds,
        "drain.timeoutSeconds": lambda s: s.drain.timeout_seconds,
        "observability.tracing.endpoint": _tracing_endpoint,
    }
)
