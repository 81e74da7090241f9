"""A part of a weight stands for the same part of the dense matrix, whatever it is stored as."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from octavo_engine.errors import ConfigError
from octavo_engine.loader.cutting import cut, cut_vector
from octavo_engine.parallel.sections import Section, whole
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import quantize_fp8, quantize_int4, quantize_int8
from octavo_kernels.weights import GGUFWeight, QuantizedWeight, Weight

ROWS, COLUMNS = 384, 512


def _gguf(name: str) -> GGUFWeight:
    values = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    return GGUFWeight(torch.from_numpy(blocks), GGMLType[name], COLUMNS)


DENSE = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
WEIGHTS: dict[str, Weight] = {
    "dense": DENSE,
    "Q8_0": _gguf("Q8_0"),
    "Q4_1": _gguf("Q4_1"),
    "int4, groups of 128": quantize_int4(DENSE),
    "int4, symmetric": quantize_int4(DENSE, 64, symmetric=True),
    "int8 rows": quantize_int8(DENSE),
    "int8 groups": quantize_int8(DENSE, 64),
    "fp8 rows": quantize_fp8(DENSE),
    "fp8 blocks": quantize_fp8(DENSE, blockwise=True),
}
HALF = Section(COLUMNS, 256, 512)


def _dense(weight: Weight) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@pytest.mark.parametrize("name", WEIGHTS)
def test_columns_are_those_of_the_dense_matrix(name: str) -> None:
    part = cut(WEIGHTS[name], (whole(ROWS),), HALF, name)

    assert tuple(part.shape) == (ROWS, 256)
    assert torch.equal(_dense(part), _dense(WEIGHTS[name])[:, 256:])


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_of_several_sections_are_those_of_the_dense_matrix(name: str) -> None:
    sections = (Section(256, 128, 256), Section(128, 0, 128))

    part = cut(WEIGHTS[name], sections, whole(COLUMNS), name)

    dense = _dense(WEIGHTS[name])
    assert torch.equal(_dense(part), torch.cat((dense[128:256], dense[256:384])))


@pytest.mark.parametrize(
    ("name", "columns"), [("Q8_0", 16), ("int4, groups of 128", 64), ("int8 groups", 32), ("fp8 blocks", 64)]
)
def test_a_cut_through_a_group_is_refused_by_name(name: str, columns: int) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size: layer: columns 0 to {columns} would go through"):
        cut(WEIGHTS[name], (whole(ROWS),), Section(COLUMNS, 0, columns), "layer")


def test_values_of_rows_are_cut_alike() -> None:
    bias = torch.arange(10.0)

    assert cut_vector(bias, (Section(6, 2, 4), Section(4, 0, 1))).tolist() == [2, 3, 6]
