"""GPTQ, AWQ, compressed-tensors and FP8 layers stand for the matrices their formats define.

Every file is packed here by the letter of its format, one code at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.checkpoint import open_checkpoint
from octavo_kernels.weights import QuantizedWeight

OUT, IN, GROUP = 16, 64, 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output the nibbles of an int32 belong to, lowest first


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(0, 16, (OUT, IN), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def zeros() -> torch.Tensor:
    return torch.randint(1, 16, (OUT, IN // GROUP), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def scales() -> torch.Tensor:
    return (torch.rand(OUT, IN // GROUP, generator=torch.Generator().manual_seed(2)) * 0.1 + 0.01).half()


def pack(nibbles: list[int], bits: int = 4) -> int:
    """Values into one signed int32, lowest bits first."""
    word = sum(value << (bits * place) for place, value in enumerate(nibbles))
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_rows(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> torch.Tensor:
    """[rows, n] -> [rows, n / per] int32, where nibble k of a word is the value at order[k]."""
    per = 32 // bits
    words = [
        [pack([int(row[start + order[k]]) for k in range(per)], bits) for start in range(0, len(row), per)]
        for row in values
    ]
    return torch.tensor(words, dtype=torch.int32)


def expected(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    spread = [x.float().repeat_interleave(GROUP, 1) for x in (zeros, scales)]
    return (codes - spread[0]) * spread[1]


def read(folder: Path, quantization: dict[str, Any], **tensors: torch.Tensor) -> torch.Tensor | QuantizedWeight:
    save_file({f"layer.{name}": x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.is_quantized
    assert checkpoint.names == {"layer.weight"}
    return checkpoint.get("layer.weight")


def dense(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}


def test_gptq(tmp_path: Path, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> None:
    weight = read(
        tmp_path,
        GPTQ,
        qweight=pack_rows(codes).t(),
        qzeros=pack_rows(zeros.t() - 1),
        scales=scales.t(),
        g_idx=torch.arange(IN, dtype=torch.int32) // GROUP,
    )

    torch.testing.assert_close(dense(weight), expected(codes, zeros, scales))
    assert weight.format == "int4-g32"


def test_gptq_version_two_stores_zeros_as_they_are(
    tmp_path: Path, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> None:
    weight = read(
        tmp_path,
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        qweight=pack_rows(codes).t(),
        qzeros=pack_rows(zeros.t()),
        scales=scales.t(),
    )

    torch.testing.assert_close(dense(weight), expected(codes, zeros, scales))


def test_gptq_with_inputs_out_of_order(
    tmp_path: Path, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> None:
    groups = torch.randperm(IN, generator=torch.Generator().manual_seed(3)) % (IN // GROUP)

    weight = read(
        tmp_path,
        GPTQ,
        qweight=pack_rows(codes).t(),
        qzeros=pack_rows(zeros.t() - 1),
        scales=scales.t(),
        g_idx=groups.to(torch.int32),
    )

    torch.testing.assert_close(dense(weight), (codes - zeros[:, groups].float()) * scales.float()[:, groups])


def test_awq(tmp_path: Path, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> None:
    weight = read(
        tmp_path,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        qweight=pack_rows(codes.t(), AWQ_ORDER),
        qzeros=pack_rows(zeros.t(), AWQ_ORDER),
        scales=scales.t(),
    )

    torch.testing.assert_close(dense(weight), expected(codes, zeros, scales))


COMPRESSED = {"quant_method": "compressed-tensors"}


def test_compressed_tensors_int4_symmetric(tmp_path: Path, codes: torch.Tensor, scales: torch.Tensor) -> None:
    weight = read(
        tmp_path,
        COMPRESSED,
        weight_packed=pack_rows(codes),
        weight_scale=scales,
        weight_shape=torch.tensor([OUT, IN]),
    )

    torch.testing.assert_close(dense(weight), expected(codes, torch.full_like(scales, 8), scales))


def test_compressed_tensors_int4_with_zero_points(
    tmp_path: Path, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> None:
    weight = read(
        tmp_path,
        COMPRESSED,
        weight_packed=pack_rows(codes),
        weight_scale=scales,
        weight_zero_point=pack_rows(zeros.t()).t(),
        weight_shape=torch.tensor([OUT, IN]),
    )

    torch.testing.assert_close(dense(weight), expected(codes, zeros, scales))


def test_compressed_tensors_int8_packed(tmp_path: Path, scales: torch.Tensor) -> None:
    codes = torch.randint(0, 256, (OUT, IN))

    weight = read(
        tmp_path,
        COMPRESSED,
        weight_packed=pack_rows(codes, (0, 1, 2, 3), bits=8),
        weight_scale=scales,
        weight_shape=torch.tensor([OUT, IN]),
    )

    torch.testing.assert_close(dense(weight), expected(codes, torch.full_like(scales, 128), scales))


def test_compressed_tensors_int8_plain(tmp_path: Path) -> None:
    codes, scale = torch.randint(-128, 128, (OUT, IN), dtype=torch.int8), torch.rand(OUT, 1)

    weight = read(tmp_path, COMPRESSED, weight=codes, weight_scale=scale)

    torch.testing.assert_close(dense(weight), codes.float() * scale)


@pytest.mark.parametrize("scale_shape", [(OUT, 1), (1,)])
def test_compressed_tensors_fp8(tmp_path: Path, scale_shape: tuple[int, ...]) -> None:
    codes, scale = torch.randn(OUT, IN).to(torch.float8_e4m3fn), torch.rand(scale_shape)

    weight = read(tmp_path, COMPRESSED, weight=codes, weight_scale=scale)

    torch.testing.assert_close(dense(weight), codes.float() * scale)


def test_fp8_in_blocks(tmp_path: Path) -> None:
    codes, scale = torch.randn(200, 150).to(torch.float8_e4m3fn), torch.rand(2, 2)

    weight = read(
        tmp_path,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        weight=codes,
        weight_scale_inv=scale,
    )

    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :150]
    torch.testing.assert_close(dense(weight), codes.float() * spread)


BAD = {
    "unknown method": ({"quant_method": "magic"}, {}, "quant_method must be one of gptq, awq"),
    "three bits": ({"quant_method": "gptq", "bits": 3}, {}, "bits must be 4, got 3"),
    "awq for another kernel": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, {}, "version must be gemm"),
    "odd blocks": ({"quant_method": "fp8", "weight_block_size": [64, 64]}, {}, "weight_block_size must be"),
    "gptq shapes": (
        GPTQ,
        {"qweight": torch.zeros(8, 16, dtype=torch.int32), "scales": torch.zeros(2, 8)},
        "do not fit together",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    quantization, tensors, message = BAD[name]
    empty = {
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "qweight": torch.zeros(8, 16, dtype=torch.int32),
    }

    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path, quantization, **{**empty, **tensors})
