"""Products with quantized weights, against the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import (
    Fp8Weight,
    from_awq,
    from_gptq,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from octavo_kernels.reference.quantize import quantize_rows
from octavo_kernels.reference.scaled_linear import scaled_linear as reference_scaled_linear
from octavo_kernels.weights import GGUFWeight

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned")

HALVES = {  # byte places of the float16 numbers in a block
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


TWO_LEVELS = (GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q5_K)


def random_gguf(ggml_type, rows, columns, device):
    data = torch.randint(0, 256, (rows, columns // ggml_type.block_size * ggml_type.block_bytes), dtype=torch.uint8)
    blocks = data.view(rows, -1, ggml_type.block_bytes)
    for place in HALVES[ggml_type]:
        values = (torch.rand(blocks.shape[:2]) - 0.5).half()
        blocks[..., place : place + 2] = values.unsqueeze(-1).view(torch.uint8)
    if ggml_type is GGMLType.MXFP4:  # scales around one
        blocks[..., 0] = blocks[..., 0] % 8 + 120
    return GGUFWeight(data.to(device), ggml_type, columns)


def assert_products_close(x, weight, dense, bias=None, tolerance=2e-3):
    """Relative to the size of what is summed: products of random numbers cancel."""
    actual = ops.linear(x, weight, bias)
    wanted = torch.nn.functional.linear(x.float(), dense.float(), bias.float() if bias is not None else None)
    largest = (x.float().abs() @ dense.float().abs().T).max()
    assert actual.dtype == x.dtype
    assert ((actual.float() - wanted).abs().max() / largest) < tolerance


@pytest.mark.parametrize("ggml_type", HALVES, ids=lambda t: t.name)
def test_gguf_blocks_pack_and_multiply(device, ggml_type):
    weight = random_gguf(ggml_type, 37, 512, device)
    packed = ops.pack_weight(weight)
    dense = weight.dequantize()
    if ggml_type in TWO_LEVELS:  # scales multiplied out are rounded to float16, relative to the row's largest
        largest = dense.abs().amax(1, keepdim=True)
        assert ((packed.dequantize() - dense).abs() / largest).max() < 2**-10
        dense = packed.dequantize()
    assert torch.equal(packed.dequantize(), dense)
    bias = torch.randn(37, device=device)
    for rows in (1, 3):
        assert_products_close(torch.randn(rows, 512, dtype=torch.float16, device=device), packed, dense, bias)


def test_gguf_types_without_a_packed_form_stay_as_they_are(device):
    weight = GGUFWeight(torch.randn(4, 64, device=device).half().view(torch.uint8), GGMLType.F16, 64)
    assert ops.pack_weight(weight) is weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (128, 384)])
def test_int4_groups_multiply(device, symmetric, group, columns):
    weight = quantize_int4(torch.randn(50, columns, device=device), group, symmetric)
    packed = ops.pack_weight(weight)
    torch.testing.assert_close(packed.dequantize(), weight.dequantize(), rtol=1e-3, atol=2e-3)
    for rows in (1, 5):
        assert_products_close(torch.randn(rows, columns, device=device), packed, packed.dequantize(), tolerance=1e-5)


@pytest.mark.parametrize("group", [0, 64])
def test_int8_weights_multiply(device, group):
    weight = quantize_int8(torch.randn(20, 192, device=device), group)
    packed = ops.pack_weight(weight)
    torch.testing.assert_close(packed.dequantize(), weight.dequantize(), rtol=1e-3, atol=2e-3)
    assert_products_close(torch.randn(4, 192, device=device), packed, packed.dequantize(), None, 1e-5)


def test_many_rows_use_a_dense_product(device):
    weight = quantize_int4(torch.randn(8, 64, device=device), 32)
    x = torch.randn(600, 64, device=device)
    packed = ops.pack_weight(weight)
    assert_products_close(x, packed, packed.dequantize(), None, 1e-5)


def test_deep_narrow_products_are_split_and_summed(device):
    weight = quantize_int4(torch.randn(16, 2048, device=device), 128)
    bias = torch.randn(16, device=device)
    x = torch.randn(2, 2048, device=device)
    packed = ops.pack_weight(weight)
    assert_products_close(x, packed, packed.dequantize(), bias, 1e-5)


@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q8_0], ids=lambda t: t.name)
def test_embedding_rows_are_dequantized_alone(device, ggml_type):
    weight = random_gguf(ggml_type, 11, 256, device)
    ids = torch.tensor([3, 0, 10, 3], device=device)
    packed = ops.pack_weight(weight)
    rows = ops.embedding(ids, packed, torch.float32)
    assert torch.equal(rows, packed.dequantize()[ids])


def test_embedding_ids_outside_the_matrix_give_zeros(device):
    weight = ops.pack_weight(random_gguf(GGMLType.Q8_0, 4, 64, device))
    rows = ops.embedding(torch.tensor([-1, 4, 2**40], device=device), weight, torch.float32)
    assert (rows == 0).all()


@pytest.mark.parametrize("blockwise", [False, True])
def test_float8_weights_multiply_few_rows_as_they_are(device, blockwise):
    weight = quantize_fp8(torch.randn(130, 200, device=device), blockwise)
    assert_products_close(torch.randn(3, 200, device=device), weight, weight.dequantize(), tolerance=1e-5)


@pytest.mark.parametrize("blockwise", [False, True])
def test_float8_weights_multiply_many_rows_quantized_alike(device, blockwise):
    weight = quantize_fp8(torch.randn(130, 256, device=device), blockwise)
    x = torch.randn(20, 256, device=device)
    runs = x.view(40, 128) if blockwise else x
    codes, scale = quantize_rows(runs, torch.float8_e4m3fn)
    quantized = (codes.float() * scale.unsqueeze(1)).view(20, 256)
    wanted = quantized @ weight.dequantize().T
    assert (ops.linear(x, weight) - wanted).abs().max() < 2e-3 * (quantized.abs() @ weight.dequantize().abs().T).max()


@pytest.mark.parametrize("rows", [3, 20])
def test_rows_of_a_wider_tensor_multiply_in_place(device, rows):
    wide = torch.randn(rows, 400, device=device)
    x = wide[:, 100:228]
    for weight in (
        quantize_fp8(torch.randn(40, 128, device=device)),
        ops.pack_weight(quantize_int4(torch.randn(40, 128))),
    ):
        weight = weight.to(device)
        assert torch.equal(ops.linear(x, weight), ops.linear(x.contiguous(), weight))


def test_float8_scale_of_the_whole_tensor(device):
    codes = torch.randn(24, 128, device=device).to(torch.float8_e4m3fn)
    weight = Fp8Weight(codes, torch.tensor([0.3], device=device))
    assert_products_close(torch.randn(2, 128, device=device), weight, weight.dequantize(), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_scaled_products_with_epilogues_match(device, dtype, activation):
    x, x_scale = ops.quantize_rows(torch.randn(19, 160, device=device), dtype)
    weight, weight_scale = ops.quantize_rows(torch.randn(33, 160, device=device), dtype)
    bias, residual = torch.randn(33, device=device), torch.randn(19, 33, device=device)
    arguments = (x, x_scale, weight, weight_scale, torch.float32, bias, activation, residual)
    torch.testing.assert_close(ops.scaled_linear(*arguments), reference_scaled_linear(*arguments), rtol=2e-3, atol=2e-3)


def test_gptq_and_awq_layouts_unpack_to_the_same_matrix(device):
    groups, columns, rows = 2, 64, 16
    codes = torch.randint(0, 16, (rows, columns))
    zeros, scales = torch.randint(1, 16, (groups, rows)), torch.rand(groups, rows)
    dense = (codes - zeros.t().repeat_interleave(32, 1)) * scales.t().repeat_interleave(32, 1)

    def words(values, dim, order):
        parts = values.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
        return sum(parts[..., place].long() << (4 * i) for i, place in enumerate(order)).to(torch.int32)

    natural, awq_order = range(8), [0, 2, 4, 6, 1, 3, 5, 7]
    gptq = from_gptq(words(codes.t(), 0, natural), words(zeros - 1, 1, natural), scales)
    awq = from_awq(words(codes.t(), 1, awq_order), words(zeros, 1, awq_order), scales)
    torch.testing.assert_close(gptq.dequantize(), dense)
    torch.testing.assert_close(awq.dequantize(), dense)
    x = torch.randn(2, columns, device=device)
    assert_products_close(x, ops.pack_weight(gptq.to(device)), dense.to(device), None, 1e-3)
