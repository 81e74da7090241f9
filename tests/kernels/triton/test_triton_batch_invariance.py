"""Batch-invariant mode: a token's result is the same, bit for bit, alone, in a batch, and in any chunking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.quantized_weights import quantize_fp8, quantize_int4
from octavo_kernels.triton.mode import batch_invariant, batch_invariant_mode

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned")


@pytest.fixture(autouse=True)
def invariant() -> Iterator[None]:
    with batch_invariant_mode():
        yield


def part_of(batch, seq, first, last):
    """The batch with tokens first .. last - 1 of one sequence alone, as a chunk that ends there."""
    start = int(batch.query_start_loc[seq])
    length = int(batch.seq_lens[seq]) - (int(batch.query_start_loc[seq + 1]) - start) + last
    return replace(
        batch,
        positions=batch.positions[start + first : start + last],
        query_start_loc=torch.tensor([0, last - first], dtype=torch.int32, device=batch.device),
        seq_lens=torch.tensor([length], dtype=torch.int32, device=batch.device),
        block_tables=batch.block_tables[seq : seq + 1],
        num_decodes=int(last - first == 1),
        max_query_len=last - first,
        max_seq_len=length,
    )


@pytest.mark.parametrize("options", [{}, {"sliding_window": 10}], ids=str)
def test_attention_does_not_depend_on_batch_or_chunks(make_paged, options):
    query, cache, batch = make_paged([(1, 90), (40, 75), (7, 7)], 4, 2, 32)
    together = ops.paged_attention(query, cache, batch, 0.2, **options)
    for seq, chunks in ((0, [(0, 1)]), (1, [(0, 40), (0, 13), (13, 14), (14, 40)]), (2, [(0, 7), (6, 7)])):
        start = int(batch.query_start_loc[seq])
        for first, last in chunks:
            rows = slice(start + first, start + last)
            alone = ops.paged_attention(query[rows], cache, part_of(batch, seq, first, last), 0.2, **options)
            assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("kind", ["dense", "int4", "fp8"])
def test_products_do_not_depend_on_the_number_of_rows(device, kind):
    dense = torch.randn(40, 256, device=device)
    weight = {"dense": lambda x: x, "int4": lambda x: ops.pack_weight(quantize_int4(x)), "fp8": quantize_fp8}[kind](
        dense
    )
    x = torch.randn(70, 256, device=device)
    together = ops.linear(x, weight)
    for rows in (slice(0, 1), slice(5, 22), slice(60, 70)):
        assert torch.equal(ops.linear(x[rows], weight), together[rows])


def test_dense_products_are_right(device):
    x, weight, bias = (
        torch.randn(9, 70, device=device),
        torch.randn(33, 70, device=device),
        torch.randn(33, device=device),
    )
    torch.testing.assert_close(
        ops.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4
    )


def test_the_mode_ends_with_its_block():
    with batch_invariant_mode(False):
        assert not batch_invariant()
    assert batch_invariant()
