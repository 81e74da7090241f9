"""Layers written by the compressed-tensors package itself read as the package reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.loader.checkpoint import open_checkpoint
from octavo_kernels.weights import QuantizedWeight

pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

OUT, IN, GROUP = 48, 128, 32
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16 in groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "W4A16 with zero points": (
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False}),
    "W4A16 a row": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "W8A16 a row": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "FP8 a row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 a tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_our_reading_is_that_of_the_package(name: str, tmp_path: Path) -> None:
    layout, fields = SCHEMES[name]
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.1
    grouped = {"group": weight.view(OUT, IN // GROUP, GROUP), "channel": weight.view(OUT, 1, IN)}
    parts = grouped.get(fields["strategy"], weight.view(1, 1, -1))
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    scale = scale.view(-1) if fields["strategy"] == "tensor" else scale
    zero = zero.view(-1) if fields["strategy"] == "tensor" else zero
    compressor = BaseCompressor.get_value_from_registry(layout)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(state, scheme)
    exact = compressor.decompress(stored, scheme)["weight"]

    save_file({f"layer.{key}": value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "format": layout,
              "config_groups": {"group_0": json.loads(scheme.model_dump_json())}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = open_checkpoint(tmp_path).get("layer.weight")

    assert isinstance(found, QuantizedWeight)
    torch.testing.assert_close(found.dequantize(torch.float32), exact.float(), rtol=1e-3, atol=1e-5)
    assert (found.dequantize(torch.float32) - weight).norm() < 0.2 * weight.norm()
