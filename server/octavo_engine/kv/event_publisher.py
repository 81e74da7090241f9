"""KV events on the wire: ZeroMQ PUB with sequence numbers, and replay of what a subscriber missed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from octavo_engine.errors import ConfigError
from octavo_engine.kv.events import KVEventBatch

SNAPSHOT_REQUEST = b"snapshot"
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
REPLAY_BATCHES = 10_000
HIGH_WATER_MARK = 100_000


class KVEventPublisher:
    """Publishes `[topic, sequence number, batch]` frames as vLLM does: 8 bytes big-endian, then msgpack.

    A subscriber that sees a gap sends the first number it misses to the replay socket and gets every batch still
    remembered, then an end marker. Slow subscribers lose batches rather than hold up the engine. `SNAPSHOT_REQUEST` in
    place of a number gets all labelled prefixes that are cached, under the number of the first batch that is not in it.
    """

    def __init__(self, endpoint: str, replay_endpoint: str = "", topic: str = "") -> None:
        self._context = zmq.Context()
        self._topic = topic.encode()
        self._next_number = 0
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=REPLAY_BATCHES)
        self._encoder = msgspec.msgpack.Encoder()
        self._publisher = self._bind(zmq.PUB, endpoint, "kv_events_endpoint")
        self._replay = self._bind(zmq.ROUTER, replay_endpoint, "kv_events_replay_endpoint") if replay_endpoint else None

    def publish(self, batch: KVEventBatch) -> None:
        payload = self._encoder.encode(batch)
        number = self._next_number
        self._next_number += 1
        self._sent.append((number, payload))
        self._publisher.send_multipart([self._topic, number.to_bytes(8, "big"), payload])

    def serve_replays(self, snapshot: Callable[[], KVEventBatch]) -> None:
        """Answer waiting requests; returns at once when there are none. Call it when all that happened is published."""
        if self._replay is None:
            return
        while True:
            try:
                frames = self._replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 3 and frames[2] == SNAPSHOT_REQUEST:
                payload = self._encoder.encode(snapshot())
                self._replay.send_multipart([frames[0], b"", self._next_number.to_bytes(8, "big"), payload])
            elif len(frames) == 3 and len(frames[2]) == 8:
                self._answer(self._replay, frames[0], int.from_bytes(frames[2], "big"))

    def close(self) -> None:
        for socket in (self._publisher, self._replay):
            if socket is not None:
                socket.close(linger=0)
        self._context.term()

    def _answer(self, replay: zmq.Socket[bytes], client: bytes, start: int) -> None:
        for number, payload in self._sent:
            if number >= start:
                replay.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
        replay.send_multipart([client, b"", END_OF_REPLAY, b""])

    def _bind(self, kind: int, endpoint: str, setting: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(HIGH_WATER_MARK)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"{setting}: cannot listen on {endpoint!r}: {error}; use tcp://*:PORT or ipc://PATH"
            ) from error
        return socket
