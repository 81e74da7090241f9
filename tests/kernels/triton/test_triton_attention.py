"""Flash attention over the paged cache and over packed sequences, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_kernels import ops
from octavo_kernels.reference import attention as reference

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned")

DECODES = [(1, 1), (1, 16), (1, 17), (1, 150), (1, 63)]
MIXED = [(1, 40), (1, 1), (5, 5), (33, 70), (2, 130), (19, 19)]


def expected(query, cache, batch, scale, **options):
    """The reference, one sequence at a time in float32, so that no unused block is touched."""
    wide = query.float()
    out = torch.empty_like(wide)
    for seq in range(batch.num_seqs):
        start, end = batch.query_start_loc[seq : seq + 2].tolist()
        length = int(batch.seq_lens[seq])
        one = replace(
            batch,
            positions=batch.positions[start:end],
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32),
            seq_lens=batch.seq_lens[seq : seq + 1],
            block_tables=batch.block_tables[seq : seq + 1],
            num_decodes=int(end - start == 1),
            max_query_len=end - start,
            max_seq_len=length,
        )
        out[start:end] = reference.paged_attention(wide[start:end], cache, one, scale, **options)
    return out


def assert_close(actual, wanted, tolerance=4e-3):
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 2, 64, 16), (9, 3, 64, 16), (4, 4, 80, 8), (16, 1, 128, 32), (7, 1, 16, 5)],
)
def test_decodes_of_any_length_match(make_paged, num_heads, num_kv_heads, head_dim, block_size):
    query, cache, batch = make_paged(DECODES, num_heads, num_kv_heads, head_dim, block_size)
    assert_close(
        ops.paged_attention(query, cache, batch, head_dim**-0.5), expected(query, cache, batch, head_dim**-0.5)
    )


@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_mixed_batches_with_cached_prefixes_match(make_paged, head_dim):
    query, cache, batch = make_paged(MIXED, 6, 2, head_dim)
    assert_close(ops.paged_attention(query, cache, batch, 0.2), expected(query, cache, batch, 0.2))


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 20},
        {"soft_cap": 5.0},
        {"sinks": True},
        {"sliding_window": 24, "soft_cap": 3.0, "sinks": True},
    ],
    ids=str,
)
def test_windows_soft_caps_and_sinks_match(make_paged, device, options):
    query, cache, batch = make_paged(MIXED, 4, 2, 32)
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(4, device=device)}
    assert_close(
        ops.paged_attention(query, cache, batch, 0.3, **options), expected(query, cache, batch, 0.3, **options)
    )


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("sequences", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_quantized_caches_are_read_with_their_scales(make_paged, kv_dtype, sequences):
    query, cache, batch = make_paged(sequences, 4, 2, 64, kv_dtype=kv_dtype)
    assert_close(ops.paged_attention(query, cache, batch, 0.125), expected(query, cache, batch, 0.125), 6e-3)


def test_tiny_value_scales_survive_float16(make_paged):
    query, cache, batch = make_paged([(1, 40)], 2, 1, 32, kv_dtype=torch.float8_e4m3fn)
    cache.value_scale *= 1e-4
    actual = ops.paged_attention(query, cache, batch, 0.2)
    wanted = expected(query, cache, batch, 0.2)
    torch.testing.assert_close(actual.float(), wanted, rtol=2e-2, atol=1e-6)


def test_float32_is_not_cut_to_tensor_float(make_paged):
    query, cache, batch = make_paged(MIXED, 4, 2, 32, dtype=torch.float32)
    assert_close(ops.paged_attention(query, cache, batch, 0.2), expected(query, cache, batch, 0.2), 2e-5)


def test_long_decodes_are_split_and_merged(make_paged, device):
    query, cache, batch = make_paged([(1, 1300), (1, 3), (1, 640)], 2, 1, 32)
    sinks = torch.randn(2, device=device)
    assert_close(
        ops.paged_attention(query, cache, batch, 0.2, sinks=sinks), expected(query, cache, batch, 0.2, sinks=sinks)
    )


def test_short_queries_over_long_contexts_are_split_too(make_paged):
    query, cache, batch = make_paged([(4, 700), (3, 9)], 2, 1, 32)
    assert_close(ops.paged_attention(query, cache, batch, 0.2), expected(query, cache, batch, 0.2))


def test_padding_sequences_of_length_zero_get_zeros(make_paged):
    query, cache, batch = make_paged([(1, 30), (1, 20), (1, 10)])
    batch.seq_lens[1:] = 0
    out = ops.paged_attention(query, cache, batch, 0.2)
    assert out[0].abs().max() > 0
    assert (out[1:] == 0).all()


@pytest.mark.parametrize("entry", [-1, -(2**31), 2**31 - 1])
def test_hostile_block_tables_read_nothing_outside_the_cache(make_paged, entry):
    query, cache, batch = make_paged([(1, 40), (20, 50)])
    cache.key.nan_to_num_()
    cache.value.nan_to_num_()
    batch.block_tables[:, 1] = entry
    batch.seq_lens[0] = 500  # longer than its table
    batch.max_seq_len = 500
    out = ops.paged_attention(query, cache, batch, 0.2)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sliding_window", [0, 9])
def test_packed_sequences_match(device, causal, sliding_window):
    starts = torch.tensor([0, 1, 20, 20, 90], dtype=torch.int32, device=device)  # the third sequence is empty
    qkv = torch.randn(90, 8, 32, dtype=torch.float16, device=device)
    query, key, value = qkv.split([4, 2, 2], dim=1)
    actual = ops.varlen_attention(query, key, value, starts, 0.2, causal, sliding_window, 4.0)
    wanted = reference.varlen_attention(
        query.float(), key.float(), value.float(), starts.unique(), 0.2, causal, sliding_window, 4.0
    )
    assert_close(actual, wanted)


@pytest.mark.parametrize("sequences", [[(1, 70), (1, 65), (1, 200)], [(1, 66), (1, 90), (30, 100), (3, 67)]], ids=str)
def test_cascade_equals_attention_over_whole_tables(make_paged, device, sequences):
    query, cache, batch = make_paged(sequences, 4, 2, 32, shared_blocks=4)
    sinks = torch.randn(4, device=device)
    actual = ops.cascade_attention(query, cache, batch, 4, 0.2, sinks=sinks)
    assert_close(actual, expected(query, cache, batch, 0.2, sinks=sinks))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_batches_match(make_paged, data):
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    cached = st.integers(0, 90)
    decodes = [(1, 1 + length) for length in data.draw(st.lists(cached, max_size=3))]
    chunk = st.tuples(st.integers(2, 40), cached).map(lambda pair: (pair[0], sum(pair)))
    sequences = decodes + data.draw(st.lists(chunk, min_size=0 if decodes else 1, max_size=2))
    block_size, head_dim = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.sampled_from([8, 24, 64]))
    query, cache, batch = make_paged(sequences, kv_heads * group, kv_heads, head_dim, block_size)
    options = {
        "sliding_window": data.draw(st.sampled_from([0, 0, 7])),
        "soft_cap": data.draw(st.sampled_from([0.0, 9.0])),
    }
    assert_close(
        ops.paged_attention(query, cache, batch, 0.3, **options), expected(query, cache, batch, 0.3, **options)
    )


def test_bfloat16_is_computed_as_such(make_paged):
    query, cache, batch = make_paged(MIXED, 4, 2, 32, dtype=torch.bfloat16)
    assert_close(ops.paged_attention(query, cache, batch, 0.2), expected(query, cache, batch, 0.2), 2e-2)
