"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad
from octavo_engine.speculation.speculator import GuessingRound


@dataclass(slots=True)
class Batch:
    """Slices for the runner, each beside the sequence it belongs to; slices of one token come first.

    choosing: the sequences whose next token is chosen from the step's logits. guessing: what was decided about guesses,
    where there is a speculator.
    """

    sequences: list[Sequence]
    slices: list[SequenceSlice]
    num_tokens: int = 0
    decode_context: int = 0
    prefill_pairs: int = 0
    choosing: list[Sequence] = field(default_factory=list)
    guessing: GuessingRound | None = None

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def num_logits(self) -> int:
        """Positions whose logits are wanted."""
        return sum(piece.num_logits for piece in self.slices)

    @property
    def load(self) -> StepLoad:
        """The step as the step-time model sees it."""
        return StepLoad(self.num_tokens, self.decode_context, self.prefill_pairs, self.num_guesses)

    @property
    def num_guesses(self) -> int:
        """Tokens that the step verifies, among its `num_tokens`."""
        return 0 if self.guessing is None else self.guessing.num_guesses
