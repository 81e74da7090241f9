"""What the first rank says is what the others hear."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.kv.transfers import Direction, Transfer
from octavo_engine.lora.adapter import Adapter, LowRank
from octavo_engine.parallel.steps import (
    decode_adapter,
    decode_lists,
    decode_slices,
    decode_transfer,
    encode_adapter,
    encode_lists,
    encode_slices,
    encode_transfer,
)
from octavo_engine.runner.interface import SequenceSlice

IDS = st.integers(0, 2**31 - 1)
BLOCK = 4


@st.composite
def slices(draw: st.DrawFn) -> SequenceSlice:
    tokens = draw(st.lists(IDS, min_size=1, max_size=20))
    start = draw(st.integers(0, 50))
    used = -(-(start + len(tokens)) // BLOCK)
    table = draw(st.lists(IDS, min_size=used, max_size=used + 5))
    return SequenceSlice(tokens, start, table, draw(st.integers(0, len(tokens))), draw(st.none() | st.integers(0, 9)))


@given(st.lists(slices(), max_size=6))
def test_slices_survive_the_way_with_the_blocks_in_use(sent: list[SequenceSlice]) -> None:
    heard = decode_slices(encode_slices(sent, BLOCK))

    used = [-(-(piece.start + len(piece.token_ids)) // BLOCK) for piece in sent]
    expected = [
        SequenceSlice(piece.token_ids, piece.start, piece.block_table[:count], piece.num_logits, piece.adapter_slot)
        for piece, count in zip(sent, used, strict=True)
    ]
    assert heard == expected


@given(st.lists(st.lists(IDS, max_size=10), max_size=6))
def test_lists_survive_the_way(sent: list[list[int]]) -> None:
    assert decode_lists(encode_lists(sent)) == sent


@given(st.sampled_from(Direction), st.dictionaries(IDS, IDS, max_size=8))
def test_copies_to_and_from_host_memory_survive_the_way(direction: Direction, source_of: dict[int, int]) -> None:
    order, numbers = encode_transfer(Transfer(direction, source_of))
    heard = decode_transfer(order, numbers)
    assert (heard.direction, heard.source_of) == (direction, source_of)


def test_adapters_survive_the_way_bit_by_bit() -> None:
    changes = {
        f"model.layers.{index}.mlp.down_proj": LowRank(
            torch.randn(rank, 7).to(dtype), torch.randn(5, rank).to(dtype), 1 / (index + 3)
        )
        for index, (rank, dtype) in enumerate([(1, torch.float32), (4, torch.bfloat16), (2, torch.float16)])
    }

    slot, heard = decode_adapter(encode_adapter(3, Adapter("a", "/a", "digest", 4, changes)))

    assert (slot, heard.rank, heard.changes.keys()) == (3, 4, changes.keys())
    for module, change in changes.items():
        assert heard.changes[module].scale == change.scale
        assert torch.equal(heard.changes[module].down, change.down)
        assert torch.equal(heard.changes[module].up, change.up)
        assert heard.changes[module].down.dtype == change.down.dtype
