"""KV events as a router receives them: over a socket, from the engine process, in vLLM's frames."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from fake_runner import load_fake
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.kv.event_publisher import END_OF_REPLAY, SNAPSHOT_REQUEST, KVEventPublisher
from octavo_engine.kv.events import AllBlocksCleared, KVEventBatch
from octavo_engine.process import EngineProcessClient
from octavo_engine.sampling_params import SamplingParams


async def test_a_subscriber_learns_which_blocks_are_stored_and_can_replay(tmp_path: Path) -> None:
    events, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    config = EngineConfig(
        model="fake",
        block_size=4,
        num_kv_blocks=64,
        num_threads=1,
        kv_events_endpoint=events,
        kv_events_replay_endpoint=replay,
        kv_events_topic="kv",
    )
    client = EngineProcessClient(config, load_fake)
    context = zmq.asyncio.Context()
    subscriber, requester = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    try:
        await client.start()
        subscriber.connect(events)
        subscriber.subscribe(b"kv")
        requester.connect(replay)
        await asyncio.sleep(0.3)  # a subscription takes effect when the publisher has heard of it
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        prompt = list(range(1, 10))
        labels = [(4, 71), (9, 72)]
        async for _ in client.generate(
            request_id="a", prompt_token_ids=prompt, sampling=sampling, prefix_labels=labels
        ):
            pass
        async with asyncio.timeout(10):
            topic, number, payload = await subscriber.recv_multipart()
        assert (topic, number) == (b"kv", bytes(8))
        stored = _events(payload)[0]
        assert stored["type"] == "BlockStored"
        assert (stored["token_ids"], stored["block_size"], stored["parent_block_hash"]) == (prompt[:8], 4, None)
        assert len(stored["block_hashes"]) == 2
        told = msgspec.msgpack.decode(payload)["prefix"]
        assert told["stored"] == [71, 72]

        async with asyncio.timeout(10):
            await requester.send_multipart([b"", bytes(8)])
            answer = await requester.recv_multipart()
            assert answer[1:] == [bytes(8), payload]
            while answer[1] != END_OF_REPLAY:
                answer = await requester.recv_multipart()
            await requester.send_multipart([b"", SNAPSHOT_REQUEST])
            _, following, snapshot = await requester.recv_multipart()
        assert int.from_bytes(following, "big") >= 1
        held = msgspec.msgpack.decode(snapshot)
        assert held["prefix"] == {"engine": told["engine"], "cleared": True, "stored": [71, 72]}
        assert held["events"] == []
    finally:
        subscriber.close(linger=0)
        requester.close(linger=0)
        context.term()
        await client.shutdown(timeout_s=5.0)


def test_an_address_that_cannot_be_bound_is_named_with_its_setting() -> None:
    with pytest.raises(ConfigError, match="kv_events_endpoint"):
        KVEventPublisher("nonsense")


def test_batches_are_numbered_and_a_cleared_cache_is_an_event_of_its_own(tmp_path: Path) -> None:
    publisher = KVEventPublisher(f"ipc://{tmp_path}/events")
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.setsockopt(zmq.RCVTIMEO, 5_000)
    try:
        subscriber.connect(f"ipc://{tmp_path}/events")
        batch = KVEventBatch(ts=1.0, events=[AllBlocksCleared()])
        while not subscriber.poll(50):
            publisher.publish(batch)
        _, number, payload = subscriber.recv_multipart()
        publisher.publish(batch)
        following = subscriber.recv_multipart()[1]
        assert int.from_bytes(following, "big") > int.from_bytes(number, "big")
        assert _events(payload) == [{"type": "AllBlocksCleared"}]
    finally:
        subscriber.close(linger=0)
        context.term()
        publisher.close()


def _events(payload: bytes) -> list[dict[str, Any]]:
    return list(msgspec.msgpack.decode(payload)["events"])
