"""The gateway at the engine's own publisher of KV events: real sockets, losses, restarts, and a replica that lies."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from fakes.gateway_door import until
from fakes.replica_process import free_port
from octavo_engine.kv.event_publisher import KVEventPublisher
from octavo_engine.kv.events import MEDIUM_DEVICE, KVEventLog
from octavo_gateway.cache_events import CacheFollower
from octavo_gateway.discovery import load_static
from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import CacheEvents, Endpoint, ModelEntry, Registry
from octavo_gateway.routing import PrefixIndex


class Engine:
    """The engine's own event log and publisher, without an engine."""

    def __init__(self, where: CacheEvents) -> None:
        self.log = KVEventLog(16)
        self.publisher = KVEventPublisher(where.events, where.replay)
        self._pump = asyncio.create_task(self._serve())

    def store(self, *labels: int) -> None:
        for label in labels:
            self.log.labelled(label.to_bytes(8, "big"), label, {MEDIUM_DEVICE})
        self.flush()

    def evict(self, *labels: int) -> None:
        for label in labels:
            self.log.removed(label.to_bytes(8, "big"))
        self.flush()

    def flush(self, lost: bool = False) -> None:
        batch = self.log.take()
        if batch is not None and not lost:
            self.publisher.publish(batch)
        elif lost:
            self.publisher._next_number += 1  # as when a queue was full

    async def _serve(self) -> None:
        while True:
            self.publisher.serve_replays(self.log.snapshot)
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self.publisher.close()


@dataclass
class Followed:
    where: CacheEvents
    registry: Registry
    index: PrefixIndex
    follower: CacheFollower
    resyncs: list[str] = field(default_factory=list)

    def knows(self, *labels: int) -> bool:
        return all(self.index.matched("r", (label,)) for label in labels)


@contextlib.asynccontextmanager
async def following() -> AsyncIterator[Followed]:
    where = CacheEvents(f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}")
    registry, index = Registry(), PrefixIndex(10_000)
    resyncs: list[str] = []
    follower = CacheFollower(registry, index, resyncs.append)
    registry.publish([ModelEntry("m", (Endpoint("r", "http://r:8000", cache_events=where),))])
    running = asyncio.create_task(follower.run())
    try:
        yield Followed(where, registry, index, follower, resyncs)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_gateway_that_comes_late_learns_all_and_then_follows() -> None:
    async with following() as gateway:
        engine = Engine(gateway.where)
        engine.store(1, 2, 3)
        await until(lambda: gateway.knows(1, 2, 3))
        engine.store(4)
        engine.evict(2)
        await until(lambda: gateway.knows(4) and not gateway.knows(2))
        assert gateway.knows(1, 3)
        engine.log.cleared()
        engine.flush()
        await until(lambda: not (gateway.knows(1) or gateway.knows(3) or gateway.knows(4)))
        await engine.close()


async def test_what_was_lost_on_the_way_is_asked_for() -> None:
    async with following() as gateway:
        engine = Engine(gateway.where)
        engine.store(1)
        await until(lambda: gateway.knows(1))
        engine.log.labelled(b"lost", 2, {MEDIUM_DEVICE})
        engine.log.removed((1).to_bytes(8, "big"))
        engine.flush(lost=True)
        engine.store(3)
        await until(lambda: gateway.knows(2, 3) and not gateway.knows(1))
        assert "gap" in gateway.resyncs
        await engine.close()


async def test_an_engine_that_restarts_is_believed_to_hold_what_it_holds_now() -> None:
    async with following() as gateway:
        engine = Engine(gateway.where)
        engine.store(1, 2)
        await until(lambda: gateway.knows(1, 2))
        await engine.close()
        engine = Engine(gateway.where)
        engine.store(7)
        gateway.follower.replica_restarted("r")  # as its metrics tell
        await until(lambda: gateway.knows(7) and not gateway.knows(1))
        assert not gateway.knows(2)
        await engine.close()


async def test_a_restart_that_nothing_else_tells_is_seen_in_the_next_event() -> None:
    async with following() as gateway:
        engine = Engine(gateway.where)
        engine.store(1)
        await until(lambda: gateway.knows(1))
        await engine.close()
        engine = Engine(gateway.where)
        for label in range(100, 200):  # until the subscription is there again
            engine.store(label)
            await asyncio.sleep(0.05)
            if not gateway.knows(1):
                break
        await until(lambda: gateway.knows(100) and not gateway.knows(1))
        assert "restart" in gateway.resyncs or "gap" in gateway.resyncs
        await engine.close()


async def test_a_replica_that_sends_nonsense_hurts_nobody_and_is_asked_anew() -> None:
    async with following() as gateway:
        engine = Engine(gateway.where)
        engine.store(1)
        await until(lambda: gateway.knows(1))
        for _ in range(5_000):
            engine.publisher._publisher.send_multipart([b"", os.urandom(8), os.urandom(64)])
        engine.publisher._publisher.send_multipart([b"one frame"])
        engine.publisher._publisher.send_multipart([b"", bytes(8), b"\x91" * 100_000])
        engine.store(2)
        await until(lambda: gateway.knows(1, 2), timeout_s=30)
        assert set(gateway.resyncs) & {"malformed", "gap"}
        assert len(gateway.resyncs) < 20, "asking is bounded too"
        engine.store(*range(50_000))  # more than the index holds
        await until(lambda: len(gateway.index) == gateway.index.max_blocks, timeout_s=30)
        await engine.close()


async def test_without_a_feed_routing_goes_on_by_what_was_sent() -> None:
    """Nobody listens at the addresses; later an engine comes that keeps no labels."""
    async with following() as gateway:
        gateway.index.record("r", (1, 2, 3))
        await asyncio.sleep(0.3)
        assert gateway.knows(1, 2, 3)
        context = zmq.asyncio.Context()
        old = context.socket(zmq.ROUTER)
        old.bind(gateway.where.replay)
        async with asyncio.timeout(20):
            client, _, wanted = await old.recv_multipart()
            assert len(wanted) == 8, "an engine that knows only numbers takes it for one"
            await old.send_multipart([client, b"", b"\xff" * 8, b""])
        await asyncio.sleep(0.1)
        assert gateway.knows(1, 2, 3)
        old.close(linger=0)
        context.term()


async def test_replicas_that_go_are_let_go_of() -> None:
    async with following() as gateway:
        engine = Engine(gateway.where)
        engine.store(1)
        await until(lambda: gateway.knows(1))
        gateway.registry.publish([])
        await until(lambda: not gateway.follower._followed)
        await engine.close()


@pytest.mark.parametrize("events", ["http://r:1", "tcp://r", "tcp://r:x", "inproc://a", "tcp://*:5557"])
def test_an_address_that_is_none_is_refused_by_its_field(events: str, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(
        f"models: [{{name: m, endpoints: [{{url: 'http://r:8000', kvEvents: {{events: '{events}', "
        "replay: 'tcp://r:5558'}}]}]"
    )
    with pytest.raises(ConfigError, match=r"endpoints\[0\].kvEvents.events"):
        load_static(file)
