"""Streams over real sockets where the client is slow, large, or in a hurry."""

from __future__ import annotations

import asyncio
import json
import socket

from fakes.gateway_door import HELLO, Door, entry, open_door, until
from fakes.openai_replica import OpenAIReplica

TOKENS = 150_000  # about 25 MB: more than the kernel's buffers of both connections hold


def _request(fields: dict[str, object]) -> bytes:
    body = json.dumps(HELLO | fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def _connect(door: Door, receive_buffer: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", door.server.port))
    return client


async def _unchanged(read: object) -> int:
    """A count once it has stopped growing."""
    assert callable(read)
    before, now = -1, read()
    while now != before:
        await asyncio.sleep(0.3)
        before, now = now, read()
    return int(now)


async def test_a_client_that_does_not_read_holds_its_replica_back_and_misses_nothing() -> None:
    loop = asyncio.get_running_loop()
    replica = OpenAIReplica("r", tokens=TOKENS)
    async with replica.serve(), open_door(entry(replica)) as door:
        client = await _connect(door, 65_536)
        await loop.sock_sendall(client, _request({"stream": True}))
        await until(lambda: any(e.bytes_sent for e in door.server.app._exchanges))
        (exchange,) = door.server.app._exchanges
        waiting = await _unchanged(lambda: exchange.bytes_sent)
        running = replica.running
        received = bytearray()
        while b"[DONE]" not in received[-60:]:
            data = await loop.sock_recv(client, 1 << 16)
            assert data
            received += data
        client.close()

    assert running == 1
    assert waiting < 0.7 * exchange.bytes_sent  # the rest stayed in the replica, not in this gateway's memory
    places = [received.find(b"r-%d " % i) for i in range(0, TOKENS, 997)]
    assert -1 not in places
    assert places == sorted(places)


async def test_a_client_that_leaves_after_a_large_body_is_noticed() -> None:
    loop = asyncio.get_running_loop()
    replica = OpenAIReplica("r", first_byte_delay=30)
    async with replica.serve(), open_door(entry(replica)) as door:
        client = await _connect(door, 65_536)
        await loop.sock_sendall(client, _request({"padding": "x" * 400_000}))
        await until(lambda: replica.running == 1)
        client.close()
        await until(lambda: replica.disconnects == 1)
        await until(lambda: door.server.app.in_flight == 0)


async def test_requests_sent_ahead_on_one_connection_are_answered_in_order() -> None:
    replica = OpenAIReplica("r", tokens=3, token_delay=0.02)
    async with replica.serve(), open_door(entry(replica)) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
        writer.write(_request({"stream": True, "seed": 1}) + _request({"stream": True, "seed": 2}))
        received = b""
        while received.count(b"[DONE]") < 2:
            received += await reader.read(65_536)
        writer.close()

    assert [r.json["seed"] for r in replica.received] == [1, 2]
    assert received.count(b"HTTP/1.1 200 OK") == 2
