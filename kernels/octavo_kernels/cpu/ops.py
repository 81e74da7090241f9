"""The single ops of this backend, for models and batches that no native step covers."""

from __future__ import annotations

import ctypes

import torch

from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.cpu import attention
from octavo_kernels.cpu.bindings import check, native
from octavo_kernels.cpu.weights import PackedWeight, pack
from octavo_kernels.weights import Weight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).contiguous()


@ops.pack_weight.register("cpu")
def pack_weight(weight: Weight) -> Weight:
    """In panels where the form has a native layout, else as it is."""
    packed = pack(weight)
    return weight if packed is None else packed


@ops.linear.register("cpu", supports=lambda x, weight, bias=None: isinstance(weight, PackedWeight) and x.ndim == 2)
def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Quantized weights meet activations quantized to int8 on the fly, unless x is float32."""
    out = torch.empty(x.shape[0], weight.shape[0])
    wide, matrix = _wide(x), weight.multiplied_with(x.dtype)
    wide_bias = None if bias is None else _wide(bias)
    pointer = None if wide_bias is None else wide_bias.data_ptr()
    check(
        native.oct_linear(ctypes.byref(matrix), wide.data_ptr(), wide.shape[0], wide.shape[1], pointer, out.data_ptr())
    )
    return out.to(x.dtype)


@ops.embedding.register("cpu", supports=lambda token_ids, weight, dtype: isinstance(weight, PackedWeight))
def embedding(token_ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Only the rows asked for are unpacked."""
    return weight.rows(token_ids).to(dtype)


@ops.rms_norm.register("cpu", supports=lambda x, weight, eps: x.dtype in _FLOATS)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide, factors = _wide(x), _wide(weight)
    out = torch.empty_like(wide)
    tokens = wide.numel() // wide.shape[-1]
    check(native.oct_rms_norm(wide.data_ptr(), factors.data_ptr(), tokens, wide.shape[-1], eps, out.data_ptr()))
    return out.to(x.dtype)


def _gated(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    wide = _wide(gate_up)
    dim = wide.shape[-1] // 2
    out = torch.empty(*wide.shape[:-1], dim)
    check(native.oct_gated(wide.data_ptr(), wide.numel() // (2 * dim), dim, int(gelu), out.data_ptr()))
    return out.to(gate_up.dtype)


@ops.silu_and_mul.register("cpu", supports=lambda gate_up: gate_up.dtype in _FLOATS)
def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return _gated(gate_up, gelu=False)


@ops.gelu_and_mul.register("cpu", supports=lambda gate_up: gate_up.dtype in _FLOATS)
def gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return _gated(gate_up, gelu=True)


def _supports_attention(query: torch.Tensor, cache: PagedKVCache, *args: object, **kwargs: object) -> bool:
    return attention.supports_heads(query, cache) and cache.key.is_contiguous()


@ops.paged_attention.register("cpu", supports=_supports_attention)
def paged_attention(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return attention.paged_attention(query, cache, batch, scale, sliding_window, soft_cap, sinks)


def _supports_sampling(logits: torch.Tensor, *args: object) -> bool:
    return logits.dtype == torch.float32 and logits.ndim == 2 and logits.is_contiguous()


@ops.sample.register("cpu", supports=_supports_sampling)
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Rows are spread over the team; a row's filters look at no more of its best tokens than they need."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    floats = [x.to(torch.float32).contiguous() for x in (temperature, top_p, min_p)]
    limits = top_k.to(torch.int32).contiguous()
    integers = [x.to(torch.int64).contiguous() for x in (seeds, counters)]
    settings = (floats[0], limits, floats[1], floats[2], *integers)
    check(native.oct_sample(logits.data_ptr(), rows, vocab, *(x.data_ptr() for x in settings), tokens.data_ptr()))
    return tokens
