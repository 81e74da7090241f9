"""Tokens to text while they arrive: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.tokenizer.interface import Tokenizer


class TextDelta(msgspec.Struct, frozen=True):
    """Text that is certain now. `stop_reason` is the stop string that ended it, `num_tokens` how many of the pushed
    tokens count: all, or those up to the one that completed the stop string."""

    text: str
    stop_reason: str | None
    num_tokens: int


class IncrementalDetokenizer:
    """Text of one sequence. For any splitting of the tokens over pushes, the deltas join to the same text: what
    `tokenizer.decode` gives, cut at the first stop string. The cost is linear in the output.

    Stop strings are looked for after `min_tokens` tokens. `continues_prompt` keeps the space with which a
    SentencePiece word starts, for output that is appended to the prompt's own text.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, *, continues_prompt: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if sampling.skip_special_tokens else frozenset()
        self._min_tokens = sampling.min_tokens
        self._ending = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else tokenizer.eos_token_ids
        )
        self._keeps_stop = sampling.include_stop_str_in_output
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_StopMatcher(stop) for stop in sampling.stop]
        self._held = ""
        self._num_tokens = 0
        self._at_start = not continues_prompt
        self._stopped = False

    def push(self, token_ids: Sequence[int], finished: bool) -> TextDelta:
        """Take new tokens; `finished` releases what was held back. After a stop string everything is ignored.

        The token that ended the sequence (eos, or one of `stop_token_ids`) adds no text, unless
        `include_stop_str_in_output` asks for it.
        """
        if self._stopped:
            return TextDelta("", None, 0)
        silent_end = finished and not self._keeps_stop and bool(token_ids) and token_ids[-1] in self._ending
        out: list[str] = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if token_id in self._skipped or (silent_end and index == len(token_ids) - 1):
                continue
            matched = self._take(self._utf8.decode(self._bytes(token_id)), out)
            if matched is not None:
                return TextDelta("".join(out), matched, index + 1)
        matched = self._take(self._utf8.decode(b"", True), out) if finished else None
        if finished and matched is None:
            out.append(self._held)
            self._held = ""
        return TextDelta("".join(out), matched, len(token_ids))

    def _bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_bytes(token_id)
        if self._at_start and piece:
            self._at_start = False
            alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
            if piece.startswith(b" ") and not alone.startswith(" "):
                return piece[1:]
        return piece

    def _take(self, text: str, out: list[str]) -> str | None:
        """Add text; move what can no longer begin a stop string to `out`. Returns the stop string that is complete."""
        if not self._stops or self._num_tokens <= self._min_tokens:
            out.append(text)
            return None
        known = len(self._held)
        self._held += text
        for position in range(known, len(self._held)):
            char = self._held[position]
            complete = [matcher.stop for matcher in self._stops if matcher.feed(char)]
            if complete:
                stop = max(complete, key=len)
                end = position + 1
                out.append(self._held[: end if self._keeps_stop else end - len(stop)])
                self._held = ""
                self._stopped = True
                return stop
        keep = max(matcher.matched for matcher in self._stops)
        certain = len(self._held) - keep
        out.append(self._held[:certain])
        self._held = self._held[certain:]
        return None


class _StopMatcher:
    """Finds one string in a stream of characters (Knuth, Morris, Pratt). `matched`: how much of it the end may be."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._borders = _borders(stop)

    def feed(self, char: str) -> bool:
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        if self.stop[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.stop)


def _borders(text: str) -> list[int]:
    """For every prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders
