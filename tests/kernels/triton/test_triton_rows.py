"""Row-wise kernels (norms, activations, rope with cache write, block copies) against their references."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.batch import PagedKVCache
from octavo_kernels.reference import activation, kv_cache, norm, quantize

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned")

SHAPES = [(1, 64), (3, 100), (17, 576), (2, 4096), (5, 1)]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]


def assert_close(actual, wanted, tolerance=3e-3):
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=tolerance, atol=tolerance)


def assert_codes_close(actual, wanted):
    """(codes, scale) pairs: equal values up to one step of the code, and nearly all exactly equal."""
    (codes, scale), (wanted_codes, wanted_scale) = actual, wanted
    assert_close(scale, wanted_scale, 1e-5)
    step = 1.01 if codes.dtype == torch.int8 else 33.0
    assert (codes.float() - wanted_codes.float()).abs().max() <= step
    assert (codes.float() == wanted_codes.float()).float().mean() > 0.98


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rms_norm_matches(device, shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape[1], device=device)
    assert_close(ops.rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5))


def test_rms_norm_of_heads_and_of_strided_rows_matches(device):
    x = torch.randn(4, 3, 200, dtype=torch.float16, device=device)[..., :72]
    weight = torch.randn(72, dtype=torch.float16, device=device)
    assert_close(ops.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_matches(device, shape):
    x, residual = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(2))
    weight = torch.randn(shape[1], dtype=torch.float16, device=device)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    wanted_normed, wanted_total = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, wanted_total)
    assert_close(normed, wanted_normed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_matches(device, shape, biased):
    x, weight = torch.randn(shape, device=device) + 3, torch.randn(shape[1], device=device)
    bias = torch.randn(shape[1], device=device) if biased else None
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), norm.layer_norm(x, weight, bias, 1e-5), 1e-5)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_norms_match(device, dtype):
    x, residual = (torch.randn(5, 200, device=device) for _ in range(2))
    weight = torch.randn(200, device=device)
    x[1], residual[1] = 0, 0
    assert_codes_close(
        ops.rms_norm_quantize(x, weight, 1e-5, dtype), quantize.rms_norm_quantize(x, weight, 1e-5, dtype)
    )
    codes, scale, total = ops.add_rms_norm_quantize(x, residual, weight, 1e-5, dtype)
    wanted_codes, wanted_scale, wanted_total = quantize.add_rms_norm_quantize(x, residual, weight, 1e-5, dtype)
    assert_codes_close((codes, scale), (wanted_codes, wanted_scale))
    assert torch.equal(total, wanted_total)


@pytest.mark.parametrize("shape", [(1, 2), (3, 200), (2, 9000)], ids=str)
def test_gated_activations_match(device, shape):
    x = 4 * torch.randn(shape, dtype=torch.float16, device=device)
    assert_close(ops.silu_and_mul(x), activation.silu_and_mul(x.float()), 2e-3)
    assert_close(ops.gelu_and_mul(x), activation.gelu_and_mul(x.float()), 2e-3)
    actual = ops.clamped_swiglu_and_mul(x, 1.702, 7.0)
    assert_close(actual, activation.clamped_swiglu_and_mul(x.float(), 1.702, 7.0), 2e-3)


def test_extreme_gates_stay_finite(device):
    x = torch.tensor([[-1e4, 1e4, -60000.0, 60000.0, 1, 1, 1, 1]], device=device)
    for op in (ops.silu_and_mul, ops.gelu_and_mul):
        assert torch.isfinite(op(x)).all()


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_rows_and_activations_match(device, dtype):
    x = torch.randn(4, 300, device=device)
    x[2] = 0
    assert_codes_close(ops.quantize_rows(x, dtype), quantize.quantize_rows(x, dtype))
    assert_codes_close(ops.silu_and_mul_quantize(x, dtype), quantize.silu_and_mul_quantize(x, dtype))


def empty_cache(device, kv_heads, head_dim, dtype, blocks=5, block_size=4):
    shape = (blocks, kv_heads, block_size, head_dim)
    scaled = dtype in QUANTIZED
    tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
    scales = [torch.full(shape[:3], -7.0, device=device) for _ in range(2)] if scaled else [None, None]
    return PagedKVCache(*tensors, *scales)


@pytest.mark.parametrize("kv_dtype", [torch.float16, *QUANTIZED])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(4, 2, 32, 32), (9, 3, 80, 32), (8, 8, 64, 0)]
)
@pytest.mark.parametrize("normed", [True, False])
def test_rope_and_cache_write_match(device, kv_dtype, heads, kv_heads, head_dim, rotary_dim, normed):
    tokens = 6
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=torch.float16, device=device)
    query, key, value = (
        x.view(tokens, -1, head_dim) for x in qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 1)
    )
    positions = torch.tensor([0, 1, 7, 30, 31, 2], device=device)
    slots = torch.randperm(20)[:tokens].to(device)
    cos_sin = torch.randn(32, rotary_dim, device=device) if rotary_dim else None
    norms = [torch.rand(head_dim, device=device) + 0.5 if normed else None for _ in range(2)]
    caches = [empty_cache(device, kv_heads, head_dim, kv_dtype) for _ in range(2)]
    actual = ops.rope_and_store_kv(query, key, value, positions, slots, caches[0], cos_sin, *norms)
    wanted = kv_cache.rope_and_store_kv(query, key, value, positions, slots, caches[1], cos_sin, *norms)
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, 4e-3)
    if kv_dtype == torch.float16:
        assert_close(caches[0].key, caches[1].key, 4e-3)
        assert torch.equal(caches[0].value, caches[1].value)
    else:
        assert_close(caches[0].key_scale, caches[1].key_scale, 4e-3)
        assert torch.equal(caches[0].value_scale, caches[1].value_scale)
        assert torch.equal(caches[0].value.float(), caches[1].value.float())


@pytest.mark.parametrize("slot", [-1, 20, 2**40])
def test_slots_outside_the_cache_are_not_written(device, slot):
    query, key = torch.randn(1, 4, 32, device=device), torch.randn(1, 2, 32, device=device)
    cache = empty_cache(device, 2, 32, torch.float32)
    positions, slots = torch.zeros(1, dtype=torch.long, device=device), torch.tensor([slot], device=device)
    ops.rope_and_store_kv(query, key, key, positions, slots, cache, None)
    assert (cache.key == 0).all()
    assert (cache.value == 0).all()


def test_the_reference_leaves_padding_unwritten_too(device):
    key = torch.randn(3, 2, 32, device=device)
    caches = [empty_cache(device, 2, 32, torch.float32) for _ in range(2)]
    slots, positions = torch.tensor([5, -1, 0], device=device), torch.zeros(3, dtype=torch.long, device=device)
    ops.rope_and_store_kv(key, key, key, positions, slots, caches[0], None)
    kv_cache.rope_and_store_kv(key, key, key, positions, slots, caches[1], None)
    assert torch.equal(caches[0].key, caches[1].key)
    assert (caches[1].key != 0).any(dim=(1, 3)).sum() == 2


def test_without_a_cache_only_queries_and_keys_turn(device):
    query, key = torch.randn(3, 4, 32, device=device), torch.randn(3, 2, 32, device=device)
    cos_sin, positions = torch.randn(8, 32, device=device), torch.arange(3, device=device)
    actual = ops.rope_and_store_kv(query, key, key, positions, positions, None, cos_sin)
    wanted = kv_cache.rope_and_store_kv(query, key, key, positions, positions, None, cos_sin)
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, 1e-5)


@pytest.mark.parametrize("kv_dtype", [torch.float16, *QUANTIZED])
def test_block_copies_read_all_sources_first(device, kv_dtype):
    cache = empty_cache(device, 2, 32, kv_dtype, blocks=6)
    cache.key.copy_(torch.randn(cache.key.shape, device=device).to(kv_dtype))
    before = cache.key.clone()
    ops.copy_blocks(cache, torch.tensor([0, 1, 4], device=device), torch.tensor([1, 5, 0], device=device))
    wanted = before.float()
    wanted[[1, 5, 0]] = before.float()[[0, 1, 4]]
    assert torch.equal(cache.key.float(), wanted)


def test_block_copies_outside_the_cache_are_ignored(device):
    cache = empty_cache(device, 2, 32, torch.float32)
    cache.key.normal_()
    before = cache.key.clone()
    ops.copy_blocks(cache, torch.tensor([-1, 99, 0], device=device), torch.tensor([1, 2, 77], device=device))
    assert torch.equal(cache.key, before)
