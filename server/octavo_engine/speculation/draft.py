"""What speculation knows of one sequence."""

from __future__ import annotations

from octavo_engine.speculation.ngram import NgramIndex

FIRST_ACCEPTANCE = 0.7
MIN_NGRAM = 2
MAX_NGRAM = 4


class Draft:
    """The n-grams of a sequence, and how often one of its guesses is accepted (a running mean)."""

    __slots__ = ("acceptance", "index")

    def __init__(self, acceptance: float) -> None:
        self.index = NgramIndex(MIN_NGRAM, MAX_NGRAM)
        self.acceptance = acceptance
