"""Weights quantized while they are loaded, and integer weights in the form this device's kernels multiply."""

from __future__ import annotations

import enum

import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import IntWeight, quantize_fp8, quantize_int4, quantize_int8
from octavo_kernels.reference.gguf_quantize import pack_q4_1, pack_q8_0, quantize_to_ggml
from octavo_kernels.weights import GGUFWeight, QuantizedWeight

_GGML_BLOCK = 32
_GROUPS = (128, 64, 32)


class OnTheFly(enum.StrEnum):
    """Formats a dense checkpoint can be brought to at load time (`EngineConfig.quantization`)."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


def quantize(weight: torch.Tensor, kind: OnTheFly, device: torch.device) -> QuantizedWeight | None:
    """Round to nearest; None where the width divides into no group, so that the weight stays dense.

    weight: [out, in]. On a CPU groups are GGML's blocks of 32, which the native kernels read; elsewhere the largest
    group of 128, 64 or 32 inputs that fits (int4), or a row (int8, fp8).
    """
    columns = weight.shape[1]
    if kind is OnTheFly.FP8:
        return quantize_fp8(weight)
    if device.type == "cpu":
        ggml_type = GGMLType.Q8_0 if kind is OnTheFly.INT8 else GGMLType.Q4_1
        return quantize_to_ggml(weight, ggml_type) if columns % _GGML_BLOCK == 0 else None
    if kind is OnTheFly.INT8:
        return quantize_int8(weight)
    group = next((size for size in _GROUPS if columns % size == 0), 0)
    return quantize_int4(weight, group) if group else None


def for_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """Integer weights of GPTQ, AWQ and compressed-tensors as GGML blocks on a CPU; any other weight as it is.

    The codes stay the same; scales and minima are rounded to half precision.
    """
    if device.type != "cpu" or not isinstance(weight, IntWeight) or weight.group_size % _GGML_BLOCK:
        return weight
    rows, columns = weight.shape
    repeat = weight.group_size // _GGML_BLOCK
    codes = weight.codes.view(-1, _GGML_BLOCK)
    scale = weight.scales.float().repeat_interleave(repeat, 1).reshape(-1)
    if weight.bits == 8:
        return weight if weight.zeros is not None else _q8_0(codes, scale, rows, columns)
    zeros = weight.zeros if weight.zeros is not None else torch.full_like(weight.scales, weight.symmetric_zero)
    minimum = -zeros.float().repeat_interleave(repeat, 1).reshape(-1) * scale
    return GGUFWeight(pack_q4_1(codes, scale, minimum).view(rows, -1), GGMLType.Q4_1, columns)


def _q8_0(codes: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> GGUFWeight:
    return GGUFWeight(pack_q8_0(codes, scale).view(rows, -1), GGMLType.Q8_0, columns)
