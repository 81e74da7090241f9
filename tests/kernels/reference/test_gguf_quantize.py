"""Quantizing to GGML blocks agrees with the `gguf` package bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.reference.gguf_quantize import QUANTIZABLE, quantize_to_ggml


@pytest.mark.parametrize("ggml_type", QUANTIZABLE, ids=lambda t: t.name)
def test_blocks_are_those_of_the_reference_quantizer(ggml_type: GGMLType) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0

    found = quantize_to_ggml(weight, ggml_type)

    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType(ggml_type.value))
    np.testing.assert_array_equal(found.data.numpy(), expected)
    assert found.shape == (16, 96)


@pytest.mark.parametrize("spread", ["normal", "outliers", "one level", "half a grid"])
def test_fitted_blocks_are_nearer_than_those_of_the_reference(spread: str) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    if spread == "outliers":
        weight[:, ::17] *= 20
    elif spread == "one level":
        weight = weight[:, :1].expand(64, 96)
    elif spread == "half a grid":
        weight = (weight * 2).round() / 4
    exact = weight.float()

    plain = quantize_to_ggml(weight, GGMLType.Q4_1).dequantize(torch.float32)
    fitted = quantize_to_ggml(weight, GGMLType.Q4_1, fitted=True).dequantize(torch.float32)

    errors = [(found - exact).view(-1, 32).square().sum(1) for found in (plain, fitted)]
    assert (errors[1] <= 1.01 * errors[0] + 1e-6).all()
    if spread in ("normal", "outliers"):
        assert errors[1].sum() < 0.95 * errors[0].sum()


def test_a_width_of_no_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="16 x 40 matrix cannot be quantized to Q8_0"):
        quantize_to_ggml(torch.zeros(16, 40), GGMLType.Q8_0)
