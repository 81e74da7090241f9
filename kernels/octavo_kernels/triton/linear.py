"""Dispatch of matrix products: dense ones to cuBLAS, packed integers and float8 to our kernels."""

from __future__ import annotations

import torch

from octavo_kernels import ops
from octavo_kernels.quantized_weights import Fp8Weight, IntWeight
from octavo_kernels.triton import dense_gemm, fp8_gemm, mode
from octavo_kernels.triton.environment import runs_here
from octavo_kernels.triton.packed_gemm import dequantize, packed_linear
from octavo_kernels.triton.packed_weight import PackedWeight, pack_gguf, pack_int
from octavo_kernels.weights import GGUFWeight, Weight


def pack(weight: Weight) -> PackedWeight | None:
    """The packed form, or None where there is none."""
    if isinstance(weight, GGUFWeight):
        return pack_gguf(weight)
    if isinstance(weight, IntWeight):
        return pack_int(weight)
    return None


@ops.pack_weight.register("triton")
def pack_weight(weight: Weight) -> Weight:
    """GGUF blocks and integer codes become `PackedWeight`; every other weight stays as it is."""
    return pack(weight) or weight


def _supports_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> bool:
    if not runs_here(x) or x.dim() != 2 or x.stride(1) != 1 or x.shape[0] == 0:
        return False
    if isinstance(weight, torch.Tensor):  # cuBLAS is the better dense product; ours only fixes the order of sums
        return mode.batch_invariant() and weight.is_floating_point() and weight.stride(1) == 1
    return isinstance(weight, (PackedWeight, Fp8Weight))


@ops.linear.register("triton", supports=_supports_linear)
def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One launch (and one more where the reduction is split)."""
    if isinstance(weight, PackedWeight):
        return packed_linear(x, weight, bias)
    if isinstance(weight, Fp8Weight):
        return fp8_gemm.fp8_linear(x, weight, bias)
    if isinstance(weight, torch.Tensor):
        return dense_gemm.invariant_linear(x, weight, bias)
    raise TypeError(f"linear: no Triton kernel for weights stored as {weight.format}")


@ops.embedding.register("triton", supports=lambda token_ids, weight, dtype: isinstance(weight, PackedWeight))
def embedding(token_ids: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """De-quantizes the wanted rows only."""
    if not isinstance(weight, PackedWeight):
        raise TypeError("embedding: no Triton kernel for weights that are not packed")
    return dequantize(weight, dtype, token_ids)
