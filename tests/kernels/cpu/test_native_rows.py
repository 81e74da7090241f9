"""Norms and gated activations equal the reference for any width."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.registry import use_backends

WIDTHS = (1, 15, 16, 47, 64, 576)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_matches(isa: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(7, width).to(dtype), torch.randn(width)
    native = ops.rms_norm(x, weight, 1e-5)
    with use_backends("reference"):
        expected = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(native, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul"])
def test_gated_activations_match(isa: str, name: str, width: int) -> None:
    torch.manual_seed(width)
    gate_up = 8 * torch.randn(5, 2 * width)
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0
    op = getattr(ops, name)
    native = op(gate_up)
    with use_backends("reference"):
        expected = op(gate_up)
    torch.testing.assert_close(native, expected, rtol=1e-5, atol=1e-5)
