"""A replica's events in order: whatever is lost, late or broken, in the end what is believed is what it holds."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.cache_events.feed import MAX_BUFFERED, CacheFeed, Resync
from octavo_gateway.cache_events.wire import Event, MalformedEventError, Update, read_event, read_snapshot


class Replica:
    """An engine that stores and removes labels, and knows what it has told."""

    def __init__(self, engine: str = "one") -> None:
        self.engine = engine
        self.held: set[int] = set()
        self.number = 0

    def step(self, rng: random.Random) -> Event:
        number, self.number = self.number, self.number + 1
        if rng.random() < 0.2:
            return Event(number, None)
        removed = [label for label in self.held if rng.random() < 0.1]
        stored = [rng.randrange(100) for _ in range(rng.randrange(3))]
        cleared = rng.random() < 0.05
        self.held = (set() if cleared else self.held - set(removed)) | set(stored)
        return Event(number, Update(self.engine, cleared, removed, stored))

    def snapshot(self) -> tuple[int, Update]:
        return self.number, Update(self.engine, True, [], list(self.held))


def believe(known: set[int], update: Update | None) -> set[int]:
    if update is None:
        return known
    return (set() if update.cleared else known) - set(update.removed) | set(update.stored)


def synced(replica: Replica) -> CacheFeed:
    feed = CacheFeed()
    feed.snapshot(*replica.snapshot())
    assert feed.needs is None
    return feed


@given(seed=st.integers(0, 2**32), loss=st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=150, deadline=None)
def test_what_is_believed_in_the_end_is_what_the_replica_holds(seed: int, loss: float) -> None:
    """Events are lost, come late beside a snapshot, and the engine restarts now and then."""
    rng = random.Random(seed)
    replica, feed, known = Replica(), CacheFeed(), set[int]()
    on_the_way: list[Event] = []
    for turn in range(200):
        if rng.random() < 0.01:
            replica = Replica(f"run-{turn}")
            on_the_way.clear()
        event = replica.step(rng)
        if rng.random() >= loss:
            on_the_way.append(event)
        while on_the_way and rng.random() < 0.7:
            known = believe(known, feed.push(on_the_way.pop(0)))
        if feed.needs is not None and rng.random() < 0.3:
            for update in feed.snapshot(*replica.snapshot()):
                known = believe(known, update)
    for event in [*on_the_way, replica.step(rng)]:
        known = believe(known, feed.push(event))
    replica.held.add(1_000)  # an event with a label, which an engine that restarted unnoticed cannot hide behind
    known = believe(known, feed.push(Event(replica.number, Update(replica.engine, stored=[1_000]))))
    replica.number += 1
    while feed.needs is not None:
        for update in feed.snapshot(*replica.snapshot()):
            known = believe(known, update)
    assert known == replica.held


def test_events_that_came_before_their_snapshot_are_joined_to_it() -> None:
    feed = CacheFeed()
    for number in (3, 4, 5):
        assert feed.push(Event(number, Update("e", stored=[number]))) is None
    updates = feed.snapshot(4, Update("e", cleared=True, stored=[1, 3]))
    assert [update.stored for update in updates] == [[1, 3], [4], [5]]
    assert feed.push(Event(6, Update("e", removed=[1]))) == Update("e", removed=[1])


def test_an_event_that_the_snapshot_already_holds_is_no_restart() -> None:
    feed = CacheFeed()
    feed.snapshot(7, Update("e", cleared=True))
    assert feed.push(Event(6, Update("e", removed=[1]))) is None
    assert feed.needs is None


def test_a_gap_and_another_run_of_the_engine_ask_for_a_snapshot() -> None:
    feed = synced(Replica("e"))
    assert feed.push(Event(1, None)) is None
    assert feed.needs is Resync.GAP
    feed = synced(Replica("e"))
    assert feed.push(Event(0, Update("other", stored=[1]))) is None
    assert feed.needs is Resync.RESTART


def test_a_replica_that_never_gives_a_snapshot_fills_no_memory() -> None:
    feed = CacheFeed()
    for number in range(10 * MAX_BUFFERED):
        feed.push(Event(number, Update("e", stored=[number])))
    assert len(feed._buffer) <= MAX_BUFFERED


def frames(payload: object, number: bytes = bytes(8)) -> list[bytes]:
    return [b"", number, msgspec.msgpack.encode(payload)]


def test_other_fields_of_a_message_are_skipped() -> None:
    event = read_event(
        frames({"ts": 1.0, "events": [{"type": "BlockStored", "token_ids": [1, 2], "what": {"else": None}}],
                "prefix": {"engine": "e", "stored": [7], "new": 1}}, (3).to_bytes(8, "big"))
    )  # fmt: skip
    assert event == Event(3, Update("e", stored=[7]))
    assert read_event(frames({"ts": 1.0, "events": []})) == Event(0, None)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        [b""],
        [b"", bytes(7), b""],
        [b"", bytes(8), b"\xc1"],
        [b"", bytes(8), b"\x91" * 100_000],
        frames([1.0, []]),
        frames({"prefix": {"engine": 1}}),
        frames({"prefix": {"engine": "e", "stored": "no"}}),
        frames({"prefix": {"engine": "e", "stored": [1.5]}}),
    ],
)
def test_a_broken_message_is_an_error_and_nothing_else(broken: list[bytes]) -> None:
    with pytest.raises(MalformedEventError):
        read_event(broken)


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_no_bytes_do_any_harm(received: list[bytes]) -> None:
    for read in (read_event, read_snapshot):
        with contextlib.suppress(MalformedEventError):
            read(received)


def test_an_engine_without_snapshots_says_so() -> None:
    assert read_snapshot([b"", b"\xff" * 8, b""]) is None
    with pytest.raises(MalformedEventError, match="no snapshot"):
        read_snapshot(frames({"prefix": {"engine": "e", "stored": [1]}}))
