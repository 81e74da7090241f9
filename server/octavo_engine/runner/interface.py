"""The seam between scheduling (which tokens of which sequence) and computing (what the model says of them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from octavo_engine.kv.transfers import Transfer
from octavo_engine.lora.adapter import Adapter
from octavo_engine.messages import ModelInfo


@dataclass(slots=True)
class SequenceSlice:
    """The part of one sequence that a step computes.

    `token_ids` are the new tokens, at positions `start .. start + len(token_ids) - 1`; everything before `start` is
    already in the KV cache at the blocks of `block_table` (block i holds positions i*block_size .. ). The table
    already covers the new tokens. `num_logits` asks for the logits of the last that many new positions (0: none,
    1: to sample the next token, len(token_ids): prompt log-probabilities or speculation). `adapter_slot` is where the
    sequence's adapter was placed, None for the base model. `sampled_row`: the only token is not known yet, it is what
    the step before chooses in that row of its samples; `token_ids` then holds a zero in its place.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    num_logits: int = 1
    adapter_slot: int | None = None
    sampled_row: int | None = None


class ModelRunner(Protocol):
    """A loaded model with its paged KV cache, on one device."""

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""

    def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Write the slices' keys and values into the cache and return logits.

        Returns `[sum(num_logits), vocab_size]` float32 on the runner's device, rows in slice order. A mixed batch of
        prefills (any chunk, any start) and decodes is one call. sampled: `[rows]` int64 on the device, what the step
        before chose, for slices with a `sampled_row`. On a GPU the call returns while the device computes.
        """

    def embed(self, prompts: Sequence[Sequence[int]], second_starts: Sequence[int] = ()) -> torch.Tensor:
        """Pool whole prompts into vectors `[len(prompts), hidden_size]` float32, normalised as the model asks.

        A classifier gives `[len(prompts), labels]` scores. second_starts: where the second text of each pair starts, 0
        for a prompt that is no pair; matters to encoders that tell the two apart.
        """

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks source -> destination (copy-on-write)."""

    def move_blocks(self, transfer: Transfer) -> None:
        """Copy KV blocks between the device and host memory; returns once they are copied."""

    def read_adapter(self, name: str, path: Path, max_rank: int) -> Adapter:
        """Read an adapter for this model into host memory, in any thread; raises `ModelLoadError`."""

    def place_adapter(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot on the device, over what was there."""

    def heartbeat(self) -> None:
        """Called now and then while there is nothing to compute; raises `EngineDeadError` where a part is lost."""


@runtime_checkable
class StagedRunner(ModelRunner, Protocol):
    """A runner that is the first of `num_stages` processes, and can begin a step while later stages compute others."""

    @property
    def num_stages(self) -> int:
        """Steps that can be computed at a time, each in another stage."""

    def begin(self, slices: Sequence[SequenceSlice]) -> Callable[[], torch.Tensor]:
        """As `forward`, but returns when this stage is done; the result waits for the last one."""


def with_sampled(slices: Sequence[SequenceSlice], sampled: torch.Tensor | None) -> Sequence[SequenceSlice]:
    """The slices with every token known, for runners that need it on the host; waits for the step before."""
    if sampled is None or all(piece.sampled_row is None for piece in slices):
        return slices
    tokens: list[int] = sampled.clamp(min=0).tolist()
    return [
        piece if piece.sampled_row is None else replace(piece, token_ids=[tokens[piece.sampled_row]], sampled_row=None)
        for piece in slices
    ]
