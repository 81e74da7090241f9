"""Products with packed weights equal the dense product of the weights they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.cpu.random_weights import QUANTIZED_TYPES, int8_bound, random_gguf
from octavo_kernels import ops
from octavo_kernels.cpu.weights import PackedWeight, pack
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import IntWeight

FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BATCHES = st.integers(1, 19)


@FEW
@given(rows=st.integers(1, 70), blocks=st.integers(1, 3), tokens=BATCHES, seed=st.integers(0, 2**20))
@pytest.mark.parametrize("ggml_type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_quantized_products_match_the_dequantized_matrix(
    isa: str, ggml_type: GGMLType, rows: int, blocks: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = random_gguf(ggml_type, rows, blocks * 256)
    packed, dense = pack(weight), weight.dequantize()
    assert packed is not None
    torch.testing.assert_close(packed.dequantize(), dense, rtol=0, atol=0)

    x = torch.randn(tokens, blocks * 256)
    expected = (x.double() @ dense.double().T).float()
    exact = ops.linear(x, packed)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    rounded = x.bfloat16()
    fast = ops.linear(rounded, packed).float()
    expected = rounded.float() @ dense.T
    slack = 0.005 * expected.abs() + 1e-4 * expected.abs().max()  # the result is rounded to bfloat16
    assert ((fast - expected).abs() <= int8_bound(rounded.float(), dense) + slack).all()


@FEW
@given(rows=st.integers(1, 50), columns=st.integers(1, 130), tokens=BATCHES, seed=st.integers(0, 2**20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_products_of_any_shape_match(
    isa: str, dtype: torch.dtype, rows: int, columns: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(dtype)
    packed = pack(weight)
    assert packed is not None
    torch.testing.assert_close(packed.dequantize(dtype), weight, rtol=0, atol=0)
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    expected = x @ weight.float().T + bias
    torch.testing.assert_close(ops.linear(x, packed, bias), expected, rtol=1e-4, atol=1e-4)
    low = ops.linear(x.to(torch.bfloat16), packed, bias.to(torch.bfloat16)).float()
    torch.testing.assert_close(low, expected, rtol=0.03, atol=0.03 * columns**0.5)


def test_int8_activations_are_closer_than_their_bound_on_average(isa: str) -> None:
    torch.manual_seed(0)
    weight = random_gguf(GGMLType.Q4_1, 64, 512)
    x = torch.randn(16, 512).bfloat16()
    expected = x.float() @ weight.dequantize().T
    error = (ops.linear(x, pack(weight)).float() - expected).norm() / expected.norm()
    assert error < 0.02


def test_embedding_unpacks_only_the_rows_asked_for(isa: str) -> None:
    torch.manual_seed(1)
    weight = random_gguf(GGMLType.Q8_0, 90, 64)
    ids = torch.tensor([3, 89, 3, 0])
    rows = ops.embedding(ids, pack(weight), torch.float32)
    torch.testing.assert_close(rows, weight.dequantize()[ids], rtol=0, atol=0)


def test_row_indices_out_of_range_are_refused(isa: str) -> None:
    packed = pack(torch.randn(4, 32))
    assert isinstance(packed, PackedWeight)
    with pytest.raises(IndexError, match="4 rows"):
        packed.rows(torch.tensor([4]))


def test_a_weight_packed_twice_is_one_matrix(isa: str) -> None:
    weight = random_gguf(GGMLType.Q8_0, 32, 64)
    assert pack(weight) is pack(weight)


def test_forms_without_a_native_layout_stay_as_they_are(isa: str) -> None:
    half = torch.randn(4, 32, dtype=torch.float16)
    assert ops.pack_weight(half) is half


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(("bits", "affine"), [(4, False), (4, True), (8, False)])
def test_integer_weights_match_up_to_float16_scales(isa: str, bits: int, affine: bool, group_size: int) -> None:
    torch.manual_seed(bits + group_size)
    low, high, dtype = (0, 16, torch.uint8) if bits == 4 else (-127, 128, torch.int8)
    codes = torch.randint(low, high, (40, 256), dtype=dtype)
    scales = torch.rand(40, 256 // group_size) + 0.01
    zeros = torch.randint(0, 16, scales.shape).float() if affine else None
    weight = IntWeight(codes, scales, zeros, bits)
    packed = pack(weight)
    assert packed is not None
    assert packed.format == f"int{bits}-g{group_size}"
    slack = float(weight.dequantize().abs().max()) * 2**-10
    torch.testing.assert_close(packed.dequantize(), weight.dequantize(), rtol=0, atol=slack)


def test_integer_weights_whose_scales_leave_float16_have_no_native_layout(isa: str) -> None:
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    assert pack(IntWeight(codes, torch.full((4, 2), 1e-6), None, 4)) is None
