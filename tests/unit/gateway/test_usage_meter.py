"""Counting tokens in passing answers, asking for the counts, and pricing them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.errors import ConfigError
from octavo_gateway.usage import PriceTable, UsageMeter
from octavo_gateway.usage.meter import ask_for_usage

USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}


def event(fields: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


TEXT = event({"choices": [{"delta": {"content": 'he said "usage": {'}}], "usage": None})
LAST = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"


def test_the_usage_event_is_read_and_passed_on_when_the_client_asked() -> None:
    meter = UsageMeter(strip=False)
    passed = b"".join(meter.feed_events(e) for e in (TEXT, TEXT, LAST, DONE))

    assert passed == TEXT + TEXT + LAST + DONE
    assert (meter.known, meter.prompt_tokens, meter.cached_tokens, meter.output_tokens) == (True, 20, 16, 5)


@pytest.mark.parametrize("pieces", [[TEXT, LAST, DONE], [TEXT + LAST + DONE], [TEXT + LAST, DONE], [TEXT, LAST + DONE]])
def test_a_usage_event_nobody_asked_for_is_taken_out_however_events_arrive(pieces: list[bytes]) -> None:
    meter = UsageMeter(strip=True)

    assert b"".join(meter.feed_events(piece) for piece in pieces) == TEXT + DONE
    assert meter.output_tokens == 5


def test_usage_in_every_chunk_counts_once_the_last_one() -> None:
    meter = UsageMeter(strip=True)
    for count in (1, 2, 3):
        chunk = event({"choices": [{"delta": {}}], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        assert meter.feed_events(chunk) == chunk

    assert (meter.prompt_tokens, meter.output_tokens) == (7, 3)


def test_a_whole_answer_is_read_at_its_end() -> None:
    body = json.dumps({"choices": [{"message": {"content": "x" * 1_000}}], "usage": USAGE}).encode()
    meter = UsageMeter(strip=False)
    for start in range(0, len(body), 100):
        meter.feed_body(body[start : start + 100])
    meter.finish_body()

    assert (meter.known, meter.prompt_tokens, meter.output_tokens) == (True, 20, 5)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"usage": 3}', b'{"usage": {"prompt_tokens": "many"}}', b'{"error": {}}']
)
def test_an_answer_without_readable_usage_stays_unknown(body: bytes) -> None:
    meter = UsageMeter(strip=False)
    meter.feed_body(body)
    meter.finish_body()

    assert not meter.known


def test_cached_tokens_never_exceed_the_prompt() -> None:
    meter = UsageMeter(strip=False)
    meter.feed_events(event({"usage": USAGE | {"prompt_tokens": 3}}))

    assert meter.cached_tokens == 3


def test_asking_for_usage_changes_nothing_else() -> None:
    body = b'{"model":"m","seed":123456789012345678901234567890,"x":1.10,"stream_options":{"other":1}}'
    asked, strip = ask_for_usage(body)

    assert strip
    assert b'"seed":123456789012345678901234567890' in asked
    assert b'"x":1.10' in asked
    assert json.loads(asked)["stream_options"] == {"other": 1, "include_usage": True}


@pytest.mark.parametrize("options", [b"5", b'"x"', b"[1]", b"true"])
def test_stream_options_of_a_wrong_type_are_left_for_the_replica_to_refuse(options: bytes) -> None:
    body = b'{"model":"m","stream_options":' + options + b"}"

    assert ask_for_usage(body) == (body, False)


def test_absent_options_and_null_are_the_same() -> None:
    for body in (b'{"model":"m"}', b'{"model":"m","stream_options":null}'):
        assert json.loads(ask_for_usage(body)[0]) == {"model": "m", "stream_options": {"include_usage": True}}


def test_a_client_that_asked_is_left_alone() -> None:
    body = b'{ "model":"m", "stream_options": {"include_usage": true} }'

    assert ask_for_usage(body) == (body, False)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=6), st.integers() | st.text(max_size=6) | st.none(), max_size=6))
def test_asking_keeps_every_other_field(fields: dict[str, object]) -> None:
    fields.pop("stream_options", None)
    asked, _ = ask_for_usage(json.dumps(fields).encode())

    assert json.loads(asked) == fields | {"stream_options": {"include_usage": True}}


def test_cost_is_per_million_with_a_price_for_cached_tokens() -> None:
    prices = PriceTable.parse({"m": {"input": 2.0, "cachedInput": 0.5, "output": 8.0}, "*": {"output": 1.0}}, "f")

    assert prices.cost("m", 1_000_000, 400_000, 500_000) == pytest.approx(1.2 + 0.2 + 4.0)
    assert prices.cost("other", 1_000_000, 0, 1_000_000) == 1.0
    assert PriceTable().cost("m", 5, 0, 5) == 0.0


@pytest.mark.parametrize("prices", [{"m": {"input": -1}}, {"m": {"inptu": 1}}, {"m": 3}])
def test_wrong_prices_are_refused(prices: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="f: prices"):
        PriceTable.parse(prices, "f")
