"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.scheduler.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """Slices for the runner, each beside the sequence it belongs to; slices of one token come first."""

    sequences: list[Sequence]
    slices: list[SequenceSlice]
    num_tokens: int = 0

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def num_context_tokens(self) -> int:
        """KV positions the step reads, summed over sequences."""
        return sum(piece.start + len(piece.token_ids) for piece in self.slices)
