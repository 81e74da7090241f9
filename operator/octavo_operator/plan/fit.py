"""Whether a model fits the memory of its accelerators, before any of them is bought. Pure.

An estimate for admission, from what the hub says of a checkpoint; the engine itself counts exactly once it runs, and
what it measured takes the estimate's place in the status.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.model import KVCacheQuantization, WeightQuantization
from octavo_operator.api.serving_runtime import Supports
from octavo_operator.plan.accelerators import GIB, memory_per_rank
from octavo_operator.plan.shape import Fit, ModelShape
from octavo_operator.plan.values import Resources

USABLE = 0.92  # of an accelerator's memory; the rest is the driver's, or lost to fragments
CONTEXT_BYTES = {True: GIB, False: 400 * 1024**2}  # of a process, with and without an accelerator
DEFAULT_STEP_TOKENS = 8_192
MAX_FIXES = 3
_TENTH = GIB // 10  # of a GiB, as memory is told
_SMALLER = (WeightQuantization.FP8, WeightQuantization.INT8, WeightQuantization.INT4)
# Bytes that remain of 16-bit weights: codes and their scales, as Octavo's own engine stores them.
_WEIGHT_SHARE = {WeightQuantization.FP8: 0.505, WeightQuantization.INT8: 0.535, WeightQuantization.INT4: 0.315}
_HEAD_SHARE = 0.535  # of the output head, which no format takes below 8 bits


@dataclass(frozen=True)
class _Setting:
    """What of a spec decides the memory."""

    weights: WeightQuantization
    cache: KVCacheQuantization
    longest: int
    ranks: int
    memory: int  # bytes of one rank


@dataclass(frozen=True)
class _Need:
    """Bytes over all ranks. `request` is the cache of one request of full length."""

    weights: int
    overhead: int
    request: int
    per_token: int

    @property
    def total(self) -> int:
        return self.weights + self.overhead + self.request


def estimate_fit(service: InferenceService, resources: Resources, supports: Supports, shape: ModelShape) -> Fit | str:
    """Whether weights, working memory and one request of full length fit; or in words why that cannot be said."""
    memory = memory_per_rank(service, resources)
    if memory is None and resources.accelerator:
        return "its memory is not known: set spec.accelerator.minMemory, or a known spec.accelerator.type"
    if memory is None:
        return "its memory is not known: set spec.resources.limits.memory"
    spec = service.spec
    setting = _Setting(
        weights=spec.model.quantization.weights,
        cache=spec.model.quantization.kv_cache,
        longest=spec.model.max_model_len or shape.max_model_len,
        ranks=spec.parallelism.tensor * spec.parallelism.pipeline if resources.accelerator else 1,
        memory=memory,
    )
    step_tokens = spec.engine.max_batched_tokens or DEFAULT_STEP_TOKENS
    on_accelerator = resources.accelerator is not None

    def need(of: _Setting) -> _Need:
        return _need(of, shape, step_tokens, on_accelerator)

    def fits(of: _Setting) -> bool:
        return need(of).total <= _usable(of)

    wanted = need(setting)
    told = (
        f"weights {_gib(wanted.weights)} + overhead {_gib(wanted.overhead)} + KV {_gib(wanted.request)} "
        f"for one request of {setting.longest:,} tokens, of {_gib(_usable(setting))} usable"
    )
    if fits(setting):
        room = (_usable(setting) - wanted.weights - wanted.overhead) // wanted.per_token
        message = f"{told}; the cache will hold about {_rounded(room):,} tokens"
        return Fit(True, message, wanted.weights, wanted.request)
    fixes: dict[str, str] = {}  # by the field to set
    for changed, text in _fixes(setting, wanted, supports, shape, on_accelerator):
        if fits(changed):
            fixes.setdefault(text.partition(":")[0], text)
    advice = "; or ".join([*fixes.values()][:MAX_FIXES]) or "use accelerators with more memory, or more of them"
    return Fit(False, f"needs {_gib(wanted.total)}: {told}; {advice}", wanted.weights, wanted.request)


def _need(of: _Setting, shape: ModelShape, step_tokens: int, on_accelerator: bool) -> _Need:
    weights = shape.weight_bytes
    if of.weights in _WEIGHT_SHARE and not shape.quantized:
        table = shape.vocabulary * shape.hidden * shape.stored_bytes  # looked up, so kept; a tied head is made of it
        layers = max(0, weights - table * (1 if shape.tied_embedding else 2)) * 2 / shape.stored_bytes
        weights = int(table + table * _HEAD_SHARE + layers * _WEIGHT_SHARE[of.weights])
    cache_bytes = 1 if of.cache in (KVCacheQuantization.FP8, KVCacheQuantization.INT8) else 2
    per_token = shape.layers * shape.kv_elements * cache_bytes
    working = step_tokens * (4 * shape.hidden + 2 * shape.intermediate) * 2
    overhead = working + of.ranks * CONTEXT_BYTES[on_accelerator]
    return _Need(weights, overhead, per_token * of.longest, per_token)


def _fixes(
    setting: _Setting, need: _Need, supports: Supports, shape: ModelShape, on_accelerator: bool
) -> Sequence[tuple[_Setting, str]]:
    """Changes that may make it fit, the smallest first."""
    fixes: list[tuple[_Setting, str]] = []
    for cache in supports.kv_cache_quantization:
        if setting.cache in (KVCacheQuantization.AUTO, KVCacheQuantization.NONE):
            fixes.append((replace(setting, cache=cache), f"set spec.model.quantization.kvCache: {cache.value}"))
            break
    room = (_usable(setting) - need.weights - need.overhead) // need.per_token
    if room >= 1_024:
        shorter = _rounded(min(room, setting.longest))
        fixes.append((replace(setting, longest=shorter), f"set spec.model.maxModelLen: {shorter}"))
    if setting.weights in (WeightQuantization.AUTO, WeightQuantization.NONE) and not shape.quantized:
        smaller = (w for w in _SMALLER if w in supports.quantization)
        fixes += [(replace(setting, weights=w), f"set spec.model.quantization.weights: {w.value}") for w in smaller]
    if not on_accelerator:
        enough = math.ceil(need.total / USABLE / _TENTH) * _TENTH
        fixes.append((replace(setting, memory=enough), f"set spec.resources.limits.memory: {_gib(enough)}"))
    elif supports.tensor_parallel and setting.ranks == 1:
        wider = ((n, f"set spec.parallelism.tensor: {n}, with as many accelerators") for n in (2, 4, 8))
        fixes += [(replace(setting, ranks=ranks), text) for ranks, text in wider]
    return fixes


def _usable(of: _Setting) -> int:
    return int(of.memory * USABLE) * of.ranks


def _rounded(tokens: int) -> int:
    """Down to two digits: an estimate."""
    unit = int(10 ** max(0, len(str(tokens)) - 2))
    return tokens // unit * unit


def _gib(amount: int) -> str:
    return f"{amount / GIB:.1f}Gi"
