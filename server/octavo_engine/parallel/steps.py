"""What the first rank tells the others to do, as one flat array of 32-bit numbers."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

from octavo_engine.kv.transfers import Direction, Transfer
from octavo_engine.lora.adapter import Adapter, LowRank
from octavo_engine.runner.interface import SequenceSlice

Numbers = npt.NDArray[np.int32]
_HEAD = 5  # numbers that describe a slice
_NO_SLOT = -1
_SCALES = "scales"  # no projection is called so


class Order(enum.IntEnum):
    """What all ranks do together."""

    FORWARD = 1
    EMBED = 2
    COPY_BLOCKS = 3
    HEARTBEAT = 4
    TO_HOST = 5
    TO_DEVICE = 6
    PLACE_ADAPTER = 7


def encode_slices(slices: Sequence[SequenceSlice], block_size: int) -> Numbers:
    """[count, then for each: tokens, start, blocks, logits, adapter slot; then all tokens, then all blocks in use]."""
    used = [piece.block_table[: -(-(piece.start + len(piece.token_ids)) // block_size)] for piece in slices]
    heads = (
        (
            len(piece.token_ids),
            piece.start,
            len(blocks),
            piece.num_logits,
            _NO_SLOT if piece.adapter_slot is None else piece.adapter_slot,
        )
        for piece, blocks in zip(slices, used, strict=True)
    )
    tokens = (piece.token_ids for piece in slices)
    return _numbers(itertools.chain([len(slices)], *heads, *tokens, *used))


def decode_slices(numbers: Numbers) -> list[SequenceSlice]:
    """The slices that `encode_slices` was given, with the blocks in use."""
    count = int(numbers[0])
    heads = numbers[1 : 1 + _HEAD * count].reshape(count, _HEAD)
    num_tokens, starts, num_blocks, num_logits, slots = heads.T.tolist() if count else ([], [], [], [], [])
    adapters = [None if slot == _NO_SLOT else slot for slot in slots]
    rest = numbers[1 + _HEAD * count :].tolist()
    tokens = _split(rest, num_tokens)
    blocks = _split(rest[sum(num_tokens) :], num_blocks)
    return [SequenceSlice(*parts) for parts in zip(tokens, starts, blocks, num_logits, adapters, strict=True)]


def encode_transfer(transfer: Transfer) -> tuple[Order, Numbers]:
    """The order for a direction, and [destination, source] of each block."""
    order = Order.TO_HOST if transfer.direction is Direction.TO_HOST else Order.TO_DEVICE
    return order, encode_lists(list(transfer.source_of.items()))


def decode_transfer(order: Order, numbers: Numbers) -> Transfer:
    direction = Direction.TO_HOST if order is Order.TO_HOST else Direction.TO_DEVICE
    return Transfer(direction, {pair[0]: pair[1] for pair in decode_lists(numbers)})


def encode_adapter(slot: int, adapter: Adapter) -> Numbers:
    """[slot, number of bytes, the matrices as a safetensors file]: no rank needs the files themselves."""
    tensors = {_SCALES: torch.tensor([change.scale for change in adapter.changes.values()], dtype=torch.float64)}
    for index, (module, change) in enumerate(adapter.changes.items()):
        tensors[f"{index}/{module}/down"], tensors[f"{index}/{module}/up"] = change.down, change.up
    data = save(tensors)
    padded = np.frombuffer(data + bytes(-len(data) % 4), dtype=np.int32)
    return np.concatenate((np.array([slot, len(data)], dtype=np.int32), padded))


def decode_adapter(numbers: Numbers) -> tuple[int, Adapter]:
    """(slot, what `encode_adapter` was given, without its name and origin)."""
    tensors = load(numbers[2:].tobytes()[: int(numbers[1])])
    scales = tensors.pop(_SCALES).tolist()
    changes: dict[str, LowRank] = {}
    for name, down in tensors.items():
        index, module, part = name.split("/")
        if part == "down":
            changes[module] = LowRank(down, tensors[f"{index}/{module}/up"], scales[int(index)])
    rank = max(change.down.shape[0] for change in changes.values())
    return int(numbers[0]), Adapter("", "", "", rank, changes)


def encode_lists(lists: Sequence[Sequence[int]]) -> Numbers:
    """[count, lengths, all numbers]: prompts, or pairs of blocks."""
    return _numbers(itertools.chain([len(lists)], map(len, lists), *lists))


def decode_lists(numbers: Numbers) -> list[list[int]]:
    count = int(numbers[0])
    return _split(numbers[1 + count :].tolist(), numbers[1 : 1 + count].tolist())


def _numbers(values: itertools.chain[int]) -> Numbers:
    return np.fromiter(values, dtype=np.int32)


def _split(values: list[int], lengths: list[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(lengths))
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]
