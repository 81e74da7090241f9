"""The reference attention equals softmax attention written out, for every switch it has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.reference import attention
from octavo_kernels.reference.kv_cache import store_kv

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 16, 4
SCALE = DIM**-0.5
SWITCHES = {
    "plain": {},
    "sliding window": {"sliding_window": 5},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
    "all together": {"sliding_window": 3, "soft_cap": 2.0, "sinks": torch.linspace(-1, 1, HEADS)},
}


@dataclass
class Sequences:
    """Random sequences, whole, and the batch that asks for the last `query_lens` tokens of each."""

    key: list[torch.Tensor]
    value: list[torch.Tensor]
    query: list[torch.Tensor]
    cache: PagedKVCache
    batch: AttentionBatch


def make(query_lens: list[int], seq_lens: list[int], dtype: torch.dtype = torch.float32) -> Sequences:
    torch.manual_seed(0)
    blocks_of = [-(-length // BLOCK) for length in seq_lens]
    order = torch.randperm(sum(blocks_of) + 3).tolist()
    scaled = dtype in (torch.int8, torch.float8_e4m3fn)
    shape = (len(order), KV_HEADS, BLOCK, DIM)
    cache = PagedKVCache(
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.ones(shape[:3]) if scaled else None,
        torch.ones(shape[:3]) if scaled else None,
    )
    tables = torch.zeros((len(seq_lens), max(blocks_of)), dtype=torch.int32)
    keys, values, queries = [], [], []
    for seq, (num_blocks, length) in enumerate(zip(blocks_of, seq_lens, strict=True)):
        tables[seq, :num_blocks] = torch.tensor([order.pop() for _ in range(num_blocks)])
        keys.append(torch.randn(length, KV_HEADS, DIM))
        values.append(torch.randn(length, KV_HEADS, DIM))
        queries.append(torch.randn(query_lens[seq], HEADS, DIM))
        places = torch.arange(length)
        store_kv(keys[-1], values[-1], tables[seq, places // BLOCK].long() * BLOCK + places % BLOCK, cache)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    batch = AttentionBatch(
        positions=torch.cat([torch.arange(n - q, n) for q, n in zip(query_lens, seq_lens, strict=True)]),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        query_start_loc=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=tables,
        num_decodes=next((i for i, q in enumerate(query_lens) if q != 1), len(query_lens)),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    return Sequences(keys, values, queries, cache, batch)


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = True,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query, one head, one key at a time."""
    out = torch.zeros_like(query)
    first = key.shape[0] - query.shape[0]
    for row in range(query.shape[0]):
        for head in range(HEADS):
            scores: dict[int, float] = {}
            for place in range(key.shape[0]):
                distance = first + row - place
                if (causal and distance < 0) or (sliding_window and abs(distance) >= sliding_window):
                    continue
                score = float(query[row, head] @ key[place, head // (HEADS // KV_HEADS)]) * SCALE
                scores[place] = soft_cap * math.tanh(score / soft_cap) if soft_cap else score
            total = sum(math.exp(s) for s in scores.values())
            total += math.exp(float(sinks[head])) if sinks is not None else 0.0
            for place, score in scores.items():
                out[row, head] += math.exp(score) / total * value[place, head // (HEADS // KV_HEADS)]
    return out


@pytest.mark.parametrize("name", SWITCHES)
def test_a_mixed_batch_of_decodes_and_chunks(name: str) -> None:
    switches: dict[str, Any] = SWITCHES[name]
    made = make(query_lens=[1, 1, 4, 7], seq_lens=[1, 11, 9, 7])

    found = ops.paged_attention(torch.cat(made.query), made.cache, made.batch, SCALE, **switches)

    expected = [written_out(q, k, v, **switches) for q, k, v in zip(made.query, made.key, made.value, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SWITCHES)
def test_packed_sequences_see_only_themselves(name: str, causal: bool) -> None:
    switches: dict[str, Any] = SWITCHES[name]
    made = make(query_lens=[6, 1, 8], seq_lens=[6, 1, 8])
    packed = [torch.cat(parts) for parts in (made.query, made.key, made.value)]

    found = ops.varlen_attention(*packed, made.batch.query_start_loc, SCALE, causal, **switches)

    expected = [
        written_out(q, k, v, causal=causal, **switches)
        for q, k, v in zip(made.query, made.key, made.value, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_long_work_done_piecewise_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(query_lens=[1, 1, 1, 9], seq_lens=[12, 5, 9, 20])
    whole = ops.paged_attention(torch.cat(made.query), made.cache, made.batch, SCALE)

    monkeypatch.setattr(attention, "MAX_SCORES", 1)
    monkeypatch.setattr(attention, "MAX_GATHERED", 1)
    piecewise = ops.paged_attention(torch.cat(made.query), made.cache, made.batch, SCALE)

    torch.testing.assert_close(piecewise, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.08)])
def test_eight_bit_caches_stay_near_the_exact_result(dtype: torch.dtype, tolerance: float) -> None:
    exact, stored = (make([1, 5], [14, 9], cache_type) for cache_type in (torch.float32, dtype))
    query = torch.cat(exact.query)

    expected = ops.paged_attention(query, exact.cache, exact.batch, SCALE)
    found = ops.paged_attention(query, stored.cache, stored.batch, SCALE)

    assert (found - expected).abs().max() < tolerance * expected.abs().max()
