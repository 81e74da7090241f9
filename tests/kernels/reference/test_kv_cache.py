"""Rotary embedding, cache writes with and without scales, block copies."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.batch import PagedKVCache
from octavo_kernels.reference.kv_cache import quantize_kv, rope

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4


def empty_cache(dtype: torch.dtype = torch.float32, blocks: int = 5) -> PagedKVCache:
    shape = (blocks, KV_HEADS, BLOCK, DIM)
    return PagedKVCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


def table(rotary_dim: int = DIM, positions: int = 32) -> torch.Tensor:
    frequencies = 100.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), -1)


def test_rope_turns_each_pair_like_a_complex_number() -> None:
    x, positions = torch.randn(3, HEADS, DIM), torch.tensor([0, 5, 31])
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(*table()[positions].chunk(2, -1)).unsqueeze(1)

    found = rope(x, positions, table())

    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), -1))


def test_rope_leaves_dimensions_beyond_the_rotary_ones_alone() -> None:
    x = torch.randn(2, HEADS, DIM)

    found = rope(x, torch.tensor([3, 4]), table(rotary_dim=4))

    assert torch.equal(found[..., 4:], x[..., 4:])
    assert not torch.equal(found[..., :4], x[..., :4])


def test_keys_and_values_land_at_their_slots() -> None:
    cache, slots = empty_cache(), torch.tensor([2, 19, 7])
    query, key, value = torch.randn(3, HEADS, DIM), torch.randn(3, KV_HEADS, DIM), torch.randn(3, KV_HEADS, DIM)

    ops.rope_and_store_kv(query, key.clone(), value, torch.arange(3), slots, cache, None)

    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(cache.key[slot // BLOCK, :, slot % BLOCK], key[token])
        assert torch.equal(cache.value[slot // BLOCK, :, slot % BLOCK], value[token])
    assert int((cache.key != 0).any(-1).sum()) == 3 * KV_HEADS


def test_heads_are_normalised_before_they_turn() -> None:
    q_norm, k_norm = torch.rand(DIM) + 0.5, torch.rand(DIM) + 0.5
    query, key, value = torch.randn(2, HEADS, DIM), torch.randn(2, KV_HEADS, DIM), torch.randn(2, KV_HEADS, DIM)
    positions = torch.tensor([4, 9])

    found = ops.rope_and_store_kv(
        query.clone(), key.clone(), value, positions, positions, None, table(), q_norm, k_norm, 1e-6
    )

    for result, x, norm in zip(found, (query, key), (q_norm, k_norm), strict=True):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        torch.testing.assert_close(result, rope(normed, positions, table()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.int8, 1 / 127), (torch.float8_e4m3fn, 1 / 14)])
def test_quantized_keys_are_near_what_was_stored(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(7, KV_HEADS, DIM) * 10

    codes, scale = quantize_kv(x, dtype)

    assert codes.dtype == dtype
    error = (codes.float() * scale.unsqueeze(-1) - x).abs().amax(-1)
    assert (error <= tolerance * x.abs().amax(-1)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_token_of_zeros_survives_quantization(dtype: torch.dtype) -> None:
    codes, scale = quantize_kv(torch.zeros(1, KV_HEADS, DIM), dtype)

    assert torch.equal(codes.float() * scale.unsqueeze(-1), torch.zeros(1, KV_HEADS, DIM))


def test_blocks_are_copied_as_if_all_were_read_first() -> None:
    cache = empty_cache()
    cache.key += torch.arange(5.0).view(5, 1, 1, 1)

    ops.copy_blocks(cache, torch.tensor([0, 1]), torch.tensor([1, 4]))

    assert cache.key[:, 0, 0, 0].tolist() == [0, 0, 2, 3, 1]
