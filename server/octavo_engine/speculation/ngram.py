"""Prompt lookup: what followed the last tokens when they occurred before (Saxena, Prompt Lookup Decoding, 2023)."""

from __future__ import annotations


class NgramIndex:
    """The latest occurrence of every n-gram of one growing sequence, built as far as it was needed."""

    __slots__ = ("_ends", "_num_indexed", "_sizes")

    def __init__(self, min_size: int, max_size: int) -> None:
        self._sizes = range(max_size, min_size - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """What followed the longest known n-gram at the end of `tokens`: `count` tokens, or [] if none is known.

        A continuation that reaches the end goes on with itself, as in LZ77: repetition is expected to repeat.
        """
        self._extend(tokens)
        for size in self._sizes:
            if len(tokens) > size:
                end = self._ends.get(tuple(tokens[-size:]))
                if end is not None:
                    period = len(tokens) - end
                    return [tokens[end + offset % period] for offset in range(count)]
        return []

    def _extend(self, tokens: list[int]) -> None:
        """Index every n-gram that ends before the last token; the last one's is what is looked up."""
        ends = self._ends
        for size in self._sizes:
            for end in range(max(size, self._num_indexed), len(tokens)):
                ends[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)
