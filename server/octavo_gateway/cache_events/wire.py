"""What a gateway reads of an engine's KV events: labels of prefixes, which are its own block hashes."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

SNAPSHOT_REQUEST = b"snapshot"
_NUMBER_BYTES = 8
_END_OF_REPLAY = (-1).to_bytes(_NUMBER_BYTES, "big", signed=True)


class MalformedEventError(Exception):
    """A message is not of the protocol."""


class Update(msgspec.Struct, frozen=True):
    """First all is forgotten if `cleared`, then `removed` go, then `stored` come. `engine`: one run of an engine."""

    engine: str
    cleared: bool = False
    removed: list[int] = []
    stored: list[int] = []


class _Batch(msgspec.Struct, frozen=True):
    """Everything else in it, such as token ids, is skipped without being looked at."""

    prefix: Update | None = None


class Event(NamedTuple):
    """One batch, by its sequence number. `update` is None where no label was concerned."""

    number: int
    update: Update | None


_DECODER = msgspec.msgpack.Decoder(_Batch)


def read_event(frames: list[bytes]) -> Event:
    """`[topic, number, payload]` as published; raises `MalformedEventError`."""
    if len(frames) != 3 or len(frames[1]) != _NUMBER_BYTES:
        raise MalformedEventError("not three frames")
    return Event(int.from_bytes(frames[1], "big"), _decode(frames[2]))


def read_snapshot(frames: list[bytes]) -> tuple[int, Update] | None:
    """`["", number, payload]` as the state before batch `number`; None from an engine that keeps no labels.

    Raises `MalformedEventError`.
    """
    if len(frames) != 3 or frames[0] or len(frames[1]) != _NUMBER_BYTES:
        raise MalformedEventError("not three frames")
    if frames[1] == _END_OF_REPLAY:
        return None
    update = _decode(frames[2])
    if update is None or not update.cleared:
        raise MalformedEventError("no snapshot")
    return int.from_bytes(frames[1], "big"), update


def _decode(payload: bytes) -> Update | None:
    try:
        return _DECODER.decode(payload).prefix
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedEventError(type(error).__name__) from None
