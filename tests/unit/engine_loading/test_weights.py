"""Weights are fused, checked against the configuration, and accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.raw_config import RawConfig
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.registry import use_backends
from octavo_kernels.weights import GGUFWeight, Weight

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    """Backends may pack weights into forms of their own; the reference keeps them readable."""
    with use_backends("reference"):
        yield


class Tensors:
    """A checkpoint in memory."""

    path = Path("memory")
    config = RawConfig({}, "memory")
    norms_hold_one = False
    is_quantized = False

    def __init__(self, **tensors: Weight) -> None:
        self._tensors = {name.replace("__", "."): value for name, value in tensors.items()}
        self.names = frozenset(self._tensors)

    def get(self, name: str) -> Weight:
        return self._tensors[name]


def loader(**tensors: Weight) -> WeightLoader:
    return WeightLoader(Tensors(**tensors), torch.float32, CPU)


def gguf_weight(rows: int, columns: int, name: str, seed: int) -> GGUFWeight:
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    return GGUFWeight(torch.from_numpy(data), GGMLType[name], columns)


def test_projections_of_one_input_become_one_matrix() -> None:
    q, k = torch.randn(4, 8), torch.randn(2, 8)

    fused = loader(q__weight=q, k__weight=k, q__bias=torch.ones(4), k__bias=torch.zeros(2)).linear(
        {"q": 4, "k": 2}, 8, bias=True
    )

    assert torch.equal(fused.weight, torch.cat((q, k)))
    assert fused.bias.tolist() == [1, 1, 1, 1, 0, 0]


def test_storage_formats_that_differ_stay_apart_and_multiply_alike() -> None:
    parts = [gguf_weight(4, 64, "Q4_0", 0), gguf_weight(6, 64, "Q8_0", 1), gguf_weight(2, 64, "Q8_0", 2)]
    x = torch.randn(3, 64)

    fused = loader(a__weight=parts[0], b__weight=parts[1], c__weight=parts[2]).linear({"a": 4, "b": 6, "c": 2}, 64)

    assert [part.shape[0] for part in fused.parts] == [4, 8]
    expected = torch.cat([x @ part.dequantize().T for part in parts], -1)
    torch.testing.assert_close(fused(x), expected)


def test_norms_are_kept_in_float32_with_their_offset() -> None:
    norm = loader(n=torch.full((3,), 0.5, dtype=torch.bfloat16)).vector("n", 3, offset=1.0)

    assert norm.dtype == torch.float32
    assert norm.tolist() == [1.5, 1.5, 1.5]


def test_formats_and_parameters_are_counted() -> None:
    weights = loader(a__weight=gguf_weight(4, 64, "Q4_0", 0), n=torch.ones(64))
    weights.linear({"a": 4}, 64)
    weights.vector("n", 64)

    assert weights.num_parameters == 4 * 64 + 64
    assert weights.describe_formats().startswith("Q4_0")


def test_a_shape_the_configuration_does_not_ask_for_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"q.weight has shape \[4, 8\], the configuration asks for \[4, 9\]"):
        loader(q__weight=torch.ones(4, 8)).linear({"q": 4}, 9)


def test_integers_are_no_weights() -> None:
    with pytest.raises(ModelLoadError, match="expected floating point"):
        loader(n=torch.ones(3, dtype=torch.int32)).vector("n", 3)


def test_tensors_nobody_asked_for_are_an_error() -> None:
    weights = loader(known=torch.ones(3), stray=torch.ones(3), rotary_emb__inv_freq=torch.ones(3))
    weights.vector("known", 3)

    with pytest.raises(ModelLoadError, match=r"1 tensors have no place in this architecture \(stray\)"):
        weights.finish()


def test_biases_of_zeros_beside_projections_are_let_pass() -> None:
    loader(q__bias=torch.zeros(3)).finish()

    with pytest.raises(ModelLoadError, match=r"\(q\.bias\)"):
        loader(q__bias=torch.ones(3)).finish()
