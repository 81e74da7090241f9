"""Dequantization agrees with the `gguf` package bit for bit, on blocks of random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.reference.gguf_blocks import dequantize_rows
from octavo_kernels.weights import GGUFWeight

ROWS, BLOCKS = 5, 3
FLOAT16_FIELDS = {  # byte offsets of the half-precision scales in a block
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
}


def random_rows(ggml_type: GGMLType, seed: int = 0) -> np.ndarray:
    """[ROWS, bytes] uint8: random codes under finite scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (ROWS * BLOCKS, ggml_type.block_bytes), dtype=np.uint8)
    for offset in FLOAT16_FIELDS.get(ggml_type, ()):
        scales = rng.normal(0, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    if ggml_type is GGMLType.MXFP4:
        blocks[:, 0] = rng.integers(100, 150, len(blocks))
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("ggml_type", [t for t in GGMLType if t.is_quantized], ids=lambda t: t.name)
def test_random_blocks_dequantize_bit_exactly(ggml_type: GGMLType) -> None:
    data = random_rows(ggml_type)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(ggml_type.value))

    found = dequantize_rows(torch.from_numpy(data), ggml_type, BLOCKS * ggml_type.block_size)

    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("ggml_type", [t for t in GGMLType if not t.is_quantized], ids=lambda t: t.name)
def test_plain_types_dequantize_bit_exactly(ggml_type: GGMLType) -> None:
    values = torch.randn(ROWS, 6)
    stored = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[ggml_type.name])

    found = dequantize_rows(stored.view(torch.uint8), ggml_type, 6)

    assert torch.equal(found, stored.float())


@pytest.mark.parametrize("ggml_type", list(GGMLType), ids=lambda t: t.name)
def test_block_layouts_are_those_of_the_format(ggml_type: GGMLType) -> None:
    expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type.value)]

    assert (ggml_type.block_size, ggml_type.block_bytes) == expected


def test_a_weight_knows_its_shape_format_and_size() -> None:
    data = torch.from_numpy(random_rows(GGMLType.Q4_K))
    weight = GGUFWeight(data, GGMLType.Q4_K, BLOCKS * 256)

    assert weight.shape == (ROWS, BLOCKS * 256)
    assert weight.format == "Q4_K"
    assert weight.nbytes == ROWS * BLOCKS * 144
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(weight.to(torch.device("cpu")).data, data)
