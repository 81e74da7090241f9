"""What speculation knows of one sequence."""

from __future__ import annotations

from octavo_engine.speculation.acceptance import Acceptance
from octavo_engine.speculation.ngram import NgramIndex

MIN_NGRAM = 2
MAX_NGRAM = 4


class Draft:
    """The n-grams of a sequence, and how often one of its guesses is accepted."""

    __slots__ = ("acceptance", "index")

    def __init__(self, acceptance: Acceptance) -> None:
        self.index = NgramIndex(MIN_NGRAM, MAX_NGRAM)
        self.acceptance = acceptance
