"""Random GGML blocks with sane scales, and how far int8 activations may move a product."""

from __future__ import annotations

import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.weights import GGUFWeight

# Byte offsets of the float16 numbers in a block.
_HALVES = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.MXFP4: (),
}
QUANTIZED_TYPES = tuple(_HALVES)


def random_gguf(ggml_type: GGMLType, rows: int, columns: int, scale: float = 0.01) -> GGUFWeight:
    """Random codes; float16 scales (and minima) of either sign up to `scale`."""
    blocks = columns // ggml_type.block_size
    data = torch.randint(0, 256, (rows, blocks, ggml_type.block_bytes), dtype=torch.uint8)
    for offset in _HALVES[ggml_type]:
        halves = ((torch.rand(rows, blocks, 1) - 0.5) * 2 * scale).half()
        data[:, :, offset : offset + 2] = halves.view(torch.uint8).reshape(rows, blocks, 2)
    if ggml_type is GGMLType.MXFP4:
        data[:, :, 0] = torch.randint(110, 122, (rows, blocks), dtype=torch.uint8)
    return GGUFWeight(data.reshape(rows, -1), ggml_type, columns)


def int8_bound(x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Largest error of x @ dense.T when each 32 columns of x are rounded to int8 with their own scale.

    Rounding moves each activation by at most half a step of its block, largest / 254; x: [T, K], dense: [N, K].
    """
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    steps = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, : x.shape[1]] / 254
    return steps @ dense.abs().T
