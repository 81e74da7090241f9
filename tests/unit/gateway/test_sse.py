"""Relaying event streams in whole events."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.sse import MAX_EVENT_BYTES, EventRelay

EVENTS = [b"data: one\n\n", b": comment\n\n", b"event: x\r\ndata: two\r\n\r\n", b"data: [DONE]\n\n"]


@settings(max_examples=150)
@given(st.lists(st.integers(0, 60), max_size=12))
def test_any_chunking_passes_every_byte_in_order_and_only_whole_events(cuts: list[int]) -> None:
    stream = b"".join(EVENTS)
    points = sorted({0, len(stream), *(c for c in cuts if c < len(stream))})
    relay, passed = EventRelay(), b""
    for start, end in itertools.pairwise(points):
        piece = relay.feed(stream[start:end])
        passed += piece
        assert not piece or passed.endswith((b"\n\n", b"\r\n\r\n"))
    passed += relay.rest()

    assert passed == stream
    assert relay.done


def test_an_unfinished_event_is_held_back() -> None:
    relay = EventRelay()

    assert relay.feed(b'data: 1\n\ndata: {"half') == b"data: 1\n\n"
    assert not relay.done
    assert relay.rest() == b'data: {"half'


def test_one_endless_event_does_not_fill_the_memory() -> None:
    relay, passed = EventRelay(), 0
    for _ in range(40):
        passed += len(relay.feed(b"x" * 65_536))

    assert passed >= 40 * 65_536 - MAX_EVENT_BYTES - 65_536
