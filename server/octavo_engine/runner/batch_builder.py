"""From the scheduler's slices to the flat tensors of one step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.staging import Array, numbers, to_device
from octavo_kernels.batch import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """token_ids: [T] int64; logits_indices: [L] int64 rows of the flat batch, in the order of the slices;
    adapter_slots: [T] int32, -1 without an adapter, or None where no sequence has one."""

    token_ids: torch.Tensor
    batch: AttentionBatch
    logits_indices: torch.Tensor
    adapter_slots: torch.Tensor | None = None


def build_step(
    slices: Sequence[SequenceSlice], block_size: int, device: torch.device, sampled: torch.Tensor | None = None
) -> StepInputs:
    """Lay the slices out as one flat batch, sequences with one new token first (see `AttentionBatch`).

    sampled: as in `ModelRunner.forward`; its rows are copied on the device. Raises `ValueError` as `check_slices` does.
    """
    check_slices(slices, block_size)
    if all(len(piece.token_ids) == 1 == piece.num_logits for piece in slices):
        return _build_decodes(slices, block_size, device, sampled)
    order = sorted(range(len(slices)), key=lambda i: len(slices[i].token_ids) != 1)
    ordered = [slices[i] for i in order]
    query_lens = np.array([len(s.token_ids) for s in ordered], dtype=np.int64)
    starts = np.array([s.start for s in ordered], dtype=np.int64)
    ends = np.cumsum(query_lens)
    seq_lens = starts + query_lens
    tables = _block_tables(ordered, seq_lens, block_size)
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - query_lens), query_lens)
    owner = np.repeat(np.arange(len(ordered)), query_lens)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    arrays = (
        _flat((s.token_ids for s in ordered), int(ends[-1]), np.int64),
        positions,
        slots,
        np.concatenate(([0], ends)).astype(np.int32),
        seq_lens.astype(np.int32),
        tables,
        _logits_rows(slices, order, ends),
    )
    token_ids, places, slot_mapping, query_start_loc, lengths, block_tables, logits_rows = to_device(arrays, device)
    if sampled is not None:
        _fill_in(token_ids, ordered, ends, sampled)
    batch = AttentionBatch(
        positions=places,
        slot_mapping=slot_mapping,
        query_start_loc=query_start_loc,
        seq_lens=lengths,
        block_tables=block_tables,
        num_decodes=int((query_lens == 1).sum()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
    )
    return StepInputs(token_ids, batch, logits_rows, _adapter_slots(ordered, query_lens, device))


def _build_decodes(
    slices: Sequence[SequenceSlice], block_size: int, device: torch.device, sampled: torch.Tensor | None
) -> StepInputs:
    """The same for one token of each sequence, in few calls: at one sequence they are a tenth of a CPU's step, because
    reading the weights has driven all that they touch out of the processor's caches."""
    rows, starts = range(len(slices)), [s.start for s in slices]
    slots = [s.block_table[p // block_size] * block_size + p % block_size for s, p in zip(slices, starts, strict=True)]
    wide = np.array(([s.token_ids[0] for s in slices], starts, slots, rows), dtype=np.int64)
    lengths = np.array(starts, dtype=np.int32) + 1
    query_start_loc = np.arange(len(slices) + 1, dtype=np.int32)
    tables = _block_tables(slices, lengths, block_size)
    longs, bounds, seq_lens, block_tables = to_device((wide, query_start_loc, lengths, tables), device)
    token_ids, positions, slot_mapping, logits_indices = longs.unbind()
    if sampled is not None:
        _fill_in(token_ids, slices, query_start_loc[1:], sampled)
    batch = AttentionBatch(
        positions=positions,
        slot_mapping=slot_mapping,
        query_start_loc=bounds,
        seq_lens=seq_lens,
        block_tables=block_tables,
        num_decodes=len(slices),
        max_query_len=1,
        max_seq_len=max(starts) + 1,
    )
    adapter_slots = _adapter_slots(slices, np.ones(len(slices), dtype=np.int64), device)
    return StepInputs(token_ids, batch, logits_indices, adapter_slots)


def check_slices(slices: Sequence[SequenceSlice], block_size: int) -> None:
    """Raise `ValueError` for a slice that is empty, asks for more logits than it has tokens, or outgrows its blocks."""
    for piece in slices:
        if not piece.token_ids or not 0 <= piece.num_logits <= len(piece.token_ids):
            raise ValueError(f"a slice of {len(piece.token_ids)} tokens cannot give {piece.num_logits} logits")
        length = piece.start + len(piece.token_ids)
        if piece.sampled_row is not None and len(piece.token_ids) != 1:
            raise ValueError(f"a slice of {len(piece.token_ids)} tokens cannot read one that is being chosen")
        if piece.start < 0 or length > len(piece.block_table) * block_size:
            raise ValueError(f"a sequence of {length} tokens does not fit its {len(piece.block_table)} blocks")


def build_packed(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, AttentionBatch]:
    """Whole prompts side by side, without a cache: (token_ids [T] int64, batch without slots and blocks)."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    arrays = (
        _flat(prompts, int(ends[-1]), np.int64),
        positions,
        np.concatenate(([0], ends)).astype(np.int32),
        lengths.astype(np.int32),
    )
    token_ids, places, query_start_loc, seq_lens = to_device(arrays, device)
    batch = AttentionBatch(
        positions=places,
        slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=torch.empty((len(prompts), 0), dtype=torch.int32, device=device),
        num_decodes=0,
        max_query_len=int(lengths.max()),
        max_seq_len=int(lengths.max()),
    )
    return token_ids, batch


def _fill_in(token_ids: torch.Tensor, ordered: Sequence[SequenceSlice], ends: Array, sampled: torch.Tensor) -> None:
    """Put what the step before chose where it is read. A row without a choice (negative) reads token 0: the sequence
    has failed, and what is computed of it is not used."""
    places = [(int(end) - 1, s.sampled_row) for end, s in zip(ends, ordered, strict=True) if s.sampled_row is not None]
    if places:
        targets, rows = numbers(places, token_ids.device, np.int64).unbind(1)
        token_ids.index_copy_(0, targets, sampled.index_select(0, rows).clamp_(min=0))


def _adapter_slots(ordered: Sequence[SequenceSlice], query_lens: Array, device: torch.device) -> torch.Tensor | None:
    if all(piece.adapter_slot is None for piece in ordered):
        return None
    slots = [-1 if piece.adapter_slot is None else piece.adapter_slot for piece in ordered]
    return to_device((np.repeat(np.array(slots, dtype=np.int32), query_lens),), device)[0]


def token_types(prompts: Sequence[Sequence[int]], second_starts: Sequence[int]) -> torch.Tensor:
    """[T] int64: 1 from where a prompt's second text starts, which is never at 0; 0 everywhere else."""
    kinds = np.zeros(sum(map(len, prompts)), dtype=np.int64)
    end = 0
    for prompt, start in zip(prompts, second_starts, strict=True):
        if start:
            kinds[end + start : end + len(prompt)] = 1
        end += len(prompt)
    return torch.from_numpy(kinds)


def _block_tables(slices: Sequence[SequenceSlice], seq_lens: Array, block_size: int) -> Array:
    if len(slices) == 1:
        return np.array([slices[0].block_table[: -(-int(seq_lens[0]) // block_size)]], dtype=np.int32)
    used = -(-seq_lens // block_size)
    ids = _flat((s.block_table[:n] for s, n in zip(slices, used.tolist(), strict=True)), int(used.sum()), np.int32)
    tables = np.zeros((len(slices), int(used.max())), dtype=np.int32)
    tables[np.arange(tables.shape[1]) < used[:, None]] = ids
    return tables


def _flat(parts: Iterable[Sequence[int]], count: int, dtype: npt.DTypeLike) -> Array:
    """Many short sequences as one array; several times as fast as an array for each."""
    return np.fromiter(itertools.chain.from_iterable(parts), dtype=dtype, count=count)


def _logits_rows(slices: Sequence[SequenceSlice], order: Sequence[int], ends: Array) -> Array:
    last = np.empty(len(slices), dtype=np.int64)
    last[np.asarray(order)] = ends
    counts = np.fromiter((piece.num_logits for piece in slices), dtype=np.int64, count=len(slices))
    before = np.cumsum(counts) - counts
    return np.repeat(last - counts - before, counts) + np.arange(counts.sum())
