"""Adapters in mixed batches equal the reference, whoever shares the batch."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.registry import use_backends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [[0], [1, 1, 1], [-1, 2, 0, 2, -1, 1], [-1, -1]], ids=str)
def test_rows_get_their_own_adapter_and_nothing_else_changes(
    native: None, dtype: torch.dtype, slots: list[int]
) -> None:
    torch.manual_seed(len(slots))
    fused, x = torch.randn(len(slots), 90).to(dtype), torch.randn(len(slots), 33).to(dtype)
    lora_a, lora_b = torch.randn(3, 4, 33).to(dtype), torch.randn(3, 50, 4).to(dtype)
    adapters, scales = torch.tensor(slots, dtype=torch.int32), torch.tensor([0.5, 1.0, 2.0])
    expected = fused.clone()
    with use_backends("reference"):
        ops.add_lora(expected[:, 20:70], x, lora_a, lora_b, adapters, scales)
    ops.add_lora(fused[:, 20:70], x, lora_a, lora_b, adapters, scales)
    torch.testing.assert_close(fused, expected)
