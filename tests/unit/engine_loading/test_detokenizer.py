"""Text leaves the detokenizer whole: characters, stop strings, and nothing else than a full decode gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from octavo_engine.detokenizer import IncrementalDetokenizer
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.tokenizer.chat_template import ChatTemplates
from octavo_engine.tokenizer.fast import FastTokenizer, SpecialTokens
from octavo_engine.tokenizer.pieces import byte_alphabet

EOS = 256
STOP_TOKEN = ord("!")


def _byte_tokenizer() -> FastTokenizer:
    """One token per byte, and an end token: the hardest case for characters."""
    vocab = byte_alphabet()
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return FastTokenizer(tokenizer, SpecialTokens(None, frozenset([EOS]), {}), ChatTemplates({}))


def _sentencepiece_tokenizer() -> FastTokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁Hello": 256, "▁world": 257, "▁": 258, "!": 259}
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return FastTokenizer(tokenizer, SpecialTokens(None, frozenset(), {}), ChatTemplates({}))


BYTES = _byte_tokenizer()
PIECES = _sentencepiece_tokenizer()


def _ids(text: str) -> list[int]:
    return list(text.encode())


def _stream(ids: Sequence[int], cuts: Sequence[int], sampling: SamplingParams, tokenizer=BYTES) -> tuple[list, str]:
    """Push the tokens in pieces that end at `cuts`."""
    detokenizer = IncrementalDetokenizer(tokenizer, sampling)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [ids[start:end] for start, end in pairwise(bounds)]
    deltas = [detokenizer.push(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    return deltas, "".join(delta.text for delta in deltas)


CUTS = st.lists(st.integers(0, 1_000), max_size=8)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=60), cuts=CUTS, skip=st.booleans())
def test_deltas_join_to_the_full_decode_for_any_tokens_and_any_splitting(ids, cuts, skip) -> None:
    sampling = SamplingParams(max_tokens=100, ignore_eos=True, skip_special_tokens=skip)
    _, text = _stream(ids, cuts, sampling)
    assert text == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 259), max_size=40), cuts=CUTS)
def test_the_same_holds_for_sentencepiece(ids, cuts) -> None:
    _, text = _stream(ids, cuts, SamplingParams(max_tokens=100), PIECES)
    assert text == PIECES.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cuts=CUTS)
def test_valid_text_never_shows_half_a_character(text: str, cuts) -> None:
    deltas, _ = _stream(_ids(text), cuts, SamplingParams(max_tokens=200))
    assert "\ufffd" not in "".join(delta.text for delta in deltas) or "\ufffd" in text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abé🙂", max_size=40),
    stops=st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=CUTS,
    keep=st.booleans(),
)
def test_the_first_complete_stop_string_ends_the_text(text: str, stops: list[str], cuts, keep: bool) -> None:
    sampling = SamplingParams(max_tokens=400, stop=tuple(stops), include_stop_str_in_output=keep)
    deltas, streamed = _stream(_ids(text), cuts, sampling)
    expected, reason = _cut_by_definition(text, stops, keep)
    assert streamed == expected
    assert [delta.stop_reason for delta in deltas if delta.stop_reason is not None] == ([reason] if reason else [])


def _cut_by_definition(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if keep else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=100, deadline=None)
@given(prefix=st.text(alphabet="ab", max_size=20), cuts=CUTS)
def test_no_delta_shows_any_part_of_a_stop_string(prefix: str, cuts) -> None:
    ids = _ids(prefix + "STOP" + "tail")
    deltas, _ = _stream(ids, cuts, SamplingParams(max_tokens=100, stop=("STOP",)))
    seen = "".join(delta.text for delta in deltas)
    assert "S" not in seen
    assert seen == prefix


def test_tokens_count_up_to_the_one_that_completes_the_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, SamplingParams(stop=("cd",)))
    assert detokenizer.push(_ids("ab"), False).num_tokens == 2
    delta = detokenizer.push(_ids("cdefg"), False)
    assert (delta.text, delta.stop_reason, delta.num_tokens) == ("", "cd", 2)
    late = detokenizer.push(_ids("more"), True)
    assert (late.text, late.stop_reason, late.num_tokens) == ("", None, 0)


def test_text_that_only_began_like_a_stop_string_is_released() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, SamplingParams(stop=("abcd",)))
    assert detokenizer.push(_ids("xab"), False).text == "x"
    assert detokenizer.push(_ids("cx"), False).text == "abcx"
    assert detokenizer.push(_ids("abc"), True).text == "abc"


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    sampling = SamplingParams(stop=("b",), min_tokens=3, max_tokens=10)
    _, text = _stream(_ids("abaab"), [1, 2, 3], sampling)
    assert text == "abaa"


def test_the_end_token_adds_no_text_even_when_special_tokens_are_shown() -> None:
    sampling = SamplingParams(skip_special_tokens=False)
    assert _stream([*_ids("hi"), EOS], [], sampling)[1] == "hi"
    assert _stream([*_ids("hi"), EOS, *_ids("!")], [], sampling)[1] == "hi<eos>!"


def test_a_stop_token_adds_no_text_unless_asked_for() -> None:
    ids = [*_ids("hi"), STOP_TOKEN]
    assert _stream(ids, [], SamplingParams(stop_token_ids=(STOP_TOKEN,)))[1] == "hi"
    kept = SamplingParams(stop_token_ids=(STOP_TOKEN,), include_stop_str_in_output=True)
    assert _stream(ids, [], kept)[1] == "hi!"


def test_an_unfinished_character_comes_as_a_replacement_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, SamplingParams())
    assert detokenizer.push(_ids("é")[:1], False).text == ""
    assert detokenizer.push([], True).text == "\ufffd"


def test_the_leading_space_of_sentencepiece_is_dropped_only_for_text_of_its_own() -> None:
    own = IncrementalDetokenizer(PIECES, SamplingParams())
    assert own.push([256, 257], True).text == "Hello world"
    appended = IncrementalDetokenizer(PIECES, SamplingParams(), continues_prompt=True)
    assert appended.push([257], True).text == " world"


def test_ids_beyond_the_vocabulary_add_no_text() -> None:
    assert _stream([*_ids("a"), 100_000, *_ids("b")], [], SamplingParams())[1] == "ab"


def test_the_work_grows_linearly_with_the_output() -> None:
    class Counting:
        """Counts characters that are looked at."""

        def __init__(self) -> None:
            self.pieces = 0

        def __getattr__(self, name: str):
            return getattr(BYTES, name)

        def token_bytes(self, token_id: int) -> bytes:
            self.pieces += 1
            return BYTES.token_bytes(token_id)

        def decode(self, ids: Sequence[int], **_: object) -> str:
            self.pieces += len(ids)
            return BYTES.decode(ids)

    counting = Counting()
    detokenizer = IncrementalDetokenizer(counting, SamplingParams(stop=("zzzz",)))
    for token in [*_ids("z x"), 0xE2] * 500:
        detokenizer.push([token], False)
    assert counting.pieces <= 2_001


@pytest.mark.parametrize("stop", ["a" * 1_000, "ab" * 500])
def test_long_repetitive_stop_strings_are_found(stop: str) -> None:
    deltas, text = _stream(_ids("a" * 500 + stop), list(range(0, 1_500, 7)), SamplingParams(stop=(stop,)))
    assert any(delta.stop_reason == stop for delta in deltas)
    assert stop not in text
