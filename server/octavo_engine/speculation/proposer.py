"""Where guesses come from."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from octavo_engine.scheduler.sequence import Sequence


class Proposer(Protocol):
    """Guesses what comes next in sequences that decode."""

    @property
    def unavailable(self) -> str:
        """Why it guesses nothing any more; empty while it works."""

    def seconds(self, num_sequences: int, depth: int) -> float:
        """What guessing `depth` tokens for each of so many sequences takes; 0 while that is unknown."""

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many tokens after the last one of each sequence; [] where there is no guess."""

    def forget(self, seq: Sequence) -> None:
        """The sequence runs no more: what is kept for it can go."""


class PromptLookup:
    """What followed the last tokens when they occurred before; costs nothing worth counting."""

    unavailable = ""

    def seconds(self, num_sequences: int, depth: int) -> float:
        return 0.0

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[list[int]]:
        return [[] if seq.draft is None else seq.draft.index.propose(seq.tokens, count) for seq, count in wanted]

    def forget(self, seq: Sequence) -> None:
        """The index goes with the sequence itself: a preempted one goes on with it."""
