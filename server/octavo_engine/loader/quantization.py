"""Weights quantized while they are loaded."""

from __future__ import annotations

import enum

import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import quantize_fp8, quantize_int4, quantize_int8
from octavo_kernels.reference.gguf_quantize import quantize_to_ggml
from octavo_kernels.weights import QuantizedWeight

_GGML_BLOCK = 32
_GROUPS = (128, 64, 32)


class OnTheFly(enum.StrEnum):
    """Formats a dense checkpoint can be brought to at load time (`EngineConfig.quantization`)."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


def quantize(weight: torch.Tensor, kind: OnTheFly, device: torch.device) -> QuantizedWeight | None:
    """Round to nearest with scales that leave little squared error; None where the width divides into no group, so that
    the weight stays dense.

    weight: [out, in]. On a CPU groups are GGML's blocks of 32, which the native kernels read; elsewhere the largest
    group of 128, 64 or 32 inputs that fits (int4), or a row (int8, fp8).
    """
    columns = weight.shape[1]
    if kind is OnTheFly.FP8:
        return quantize_fp8(weight)
    if device.type == "cpu":
        ggml_type = GGMLType.Q8_0 if kind is OnTheFly.INT8 else GGMLType.Q4_1
        return quantize_to_ggml(weight, ggml_type, fitted=True) if columns % _GGML_BLOCK == 0 else None
    if kind is OnTheFly.INT8:
        return quantize_int8(weight)
    group = next((size for size in _GROUPS if columns % size == 0), 0)
    return quantize_int4(weight, group) if group else None
