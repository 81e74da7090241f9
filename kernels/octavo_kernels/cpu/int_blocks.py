"""Group-wise integer weights as the GGML blocks of 32 that the native packing knows."""

from __future__ import annotations

import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import IntWeight
from octavo_kernels.weights import GGUFWeight

_BLOCK = 32
_HALF_TINY = 6.2e-5  # below it float16 loses digits
_HALF_MAX = 65504.0


def to_gguf_blocks(weight: IntWeight) -> GGUFWeight | None:
    """4 bits as Q4_0 (symmetric) or Q4_1, 8 bits as Q8_0; None where groups are no multiple of 32 or scales do not
    fit float16, to which they are rounded."""
    rows, columns = weight.shape
    affine = weight.zeros is not None
    if weight.group_size % _BLOCK or (affine and weight.bits == 8):
        return None
    repeat = weight.group_size // _BLOCK
    scales = _halves(weight.scales, repeat)
    minima = None if weight.zeros is None else _halves(-weight.zeros * weight.scales.float(), repeat)
    if scales is None or (affine and minima is None):
        return None
    codes = weight.codes.view(rows, columns // _BLOCK, _BLOCK)
    body = codes.view(torch.uint8) if weight.bits == 8 else codes[..., :16] | (codes[..., 16:] << 4)
    parts = [scales, body] if minima is None else [scales, minima, body]
    ggml_type = GGMLType.Q8_0 if weight.bits == 8 else GGMLType.Q4_0 if minima is None else GGMLType.Q4_1
    return GGUFWeight(torch.cat(parts, dim=-1).flatten(1), ggml_type, columns)


def _halves(values: torch.Tensor, repeat: int) -> torch.Tensor | None:
    """[rows, groups] as the bytes of float16 numbers, one for each block: [rows, groups * repeat, 2] uint8."""
    size = values.float().abs()
    if ((size > 0) & (size < _HALF_TINY)).any() or (size > _HALF_MAX).any():
        return None
    halves = values.half().repeat_interleave(repeat, dim=1).contiguous()
    return halves.view(torch.uint8).view(*halves.shape, 2)
