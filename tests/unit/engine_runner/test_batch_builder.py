"""The flat batch holds every slice's tokens, positions and slots, decodes first, logits in the caller's order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.runner.batch_builder import build_packed, build_step
from octavo_engine.runner.interface import SequenceSlice, with_sampled

BLOCK = 4
CPU = torch.device("cpu")


@st.composite
def batches(draw: st.DrawFn) -> list[SequenceSlice]:
    """Slices of distinct tokens over distinct blocks."""
    slices, token, block = [], 1000, 0
    decodes = draw(st.booleans())
    for _ in range(draw(st.integers(1, 6))):
        start, length = draw(st.integers(0, 20)), 1 if decodes else draw(st.integers(1, 9))
        spare = draw(st.integers(0, 2))
        blocks = -(-(start + length) // BLOCK) + spare
        tokens = list(range(token, token + length))
        num_logits = 1 if decodes else draw(st.integers(0, length))
        slices.append(SequenceSlice(tokens, start, list(range(block, block + blocks)), num_logits))
        token, block = token + length, block + blocks
    return slices


@given(batches())
@settings(max_examples=80, deadline=None)
def test_every_token_has_its_position_and_slot(slices: list[SequenceSlice]) -> None:
    inputs = build_step(slices, BLOCK, CPU)
    batch = inputs.batch

    expected = {}
    for piece in slices:
        for offset, token in enumerate(piece.token_ids):
            place = piece.start + offset
            expected[token] = (place, piece.block_table[place // BLOCK] * BLOCK + place % BLOCK)
    found = zip(batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)
    assert dict(zip(inputs.token_ids.tolist(), found, strict=True)) == expected


@given(batches())
@settings(max_examples=80, deadline=None)
def test_sequences_with_one_token_come_first(slices: list[SequenceSlice]) -> None:
    batch = build_step(slices, BLOCK, CPU).batch

    query_lens = batch.query_start_loc.diff().tolist()
    assert batch.num_decodes == sum(length == 1 for length in query_lens)
    assert all(length == 1 for length in query_lens[: batch.num_decodes])
    assert batch.max_query_len == max(query_lens)
    assert batch.max_seq_len == int(batch.seq_lens.max())


@given(batches())
@settings(max_examples=80, deadline=None)
def test_logits_come_in_the_order_of_the_slices(slices: list[SequenceSlice]) -> None:
    inputs = build_step(slices, BLOCK, CPU)

    wanted = [t for piece in slices for t in piece.token_ids[len(piece.token_ids) - piece.num_logits :]]
    assert inputs.token_ids[inputs.logits_indices].tolist() == wanted


@given(batches())
@settings(max_examples=40, deadline=None)
def test_each_sequence_keeps_its_own_blocks(slices: list[SequenceSlice]) -> None:
    inputs = build_step(slices, BLOCK, CPU)
    batch = inputs.batch

    owner = {piece.token_ids[0]: piece for piece in slices}
    for row, (start, length) in enumerate(
        zip(batch.query_start_loc[:-1].tolist(), batch.seq_lens.tolist(), strict=True)
    ):
        piece = owner[int(inputs.token_ids[start])]
        used = -(-length // BLOCK)
        assert batch.block_tables[row, :used].tolist() == list(piece.block_table[:used])
        assert length == piece.start + len(piece.token_ids)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (SequenceSlice([], 0, [0], 0), "0 tokens cannot give 0 logits"),
        (SequenceSlice([1], 0, [0], 2), "1 tokens cannot give 2 logits"),
        (SequenceSlice([1], 4, [0]), "5 tokens does not fit its 1 blocks"),
    ],
)
def test_an_impossible_slice_is_refused(piece: SequenceSlice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_step([piece], BLOCK, CPU)


def test_packed_prompts_count_positions_from_zero() -> None:
    token_ids, batch = build_packed([[5, 6, 7], [8]], CPU)

    assert token_ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.query_start_loc.tolist() == [0, 3, 4]


@given(batches(), st.data())
@settings(max_examples=80, deadline=None)
def test_tokens_that_are_still_being_chosen_are_read_from_the_samples(
    slices: list[SequenceSlice], data: st.DataObject
) -> None:
    sampled = torch.tensor(data.draw(st.lists(st.integers(-2, 999), min_size=1, max_size=8)))
    expected = []
    for index, piece in enumerate(slices):
        if len(piece.token_ids) == 1 and data.draw(st.booleans()):
            row = data.draw(st.integers(0, len(sampled) - 1))
            slices[index] = replace(piece, token_ids=[0], sampled_row=row)
            expected.append(max(0, int(sampled[row])))  # a row without a choice is read as token 0
        else:
            expected.extend(piece.token_ids)

    inputs = build_step(slices, BLOCK, CPU, sampled)
    assert sorted(inputs.token_ids.tolist()) == sorted(expected)
    known = [token for piece in with_sampled(slices, sampled) for token in piece.token_ids]
    assert known == expected
    assert torch.equal(inputs.token_ids, build_step(with_sampled(slices, sampled), BLOCK, CPU).token_ids)


def test_only_a_single_token_can_be_read_from_the_samples() -> None:
    with pytest.raises(ValueError, match="being chosen"):
        build_step([SequenceSlice([1, 2], 0, [0], 1, None, 0)], BLOCK, CPU, torch.tensor([5]))
