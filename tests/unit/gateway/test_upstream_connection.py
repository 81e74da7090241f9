"""One connection to a replica over a real socket: what a reader's pace does to it and to the next request."""

from __future__ import annotations

import asyncio

import pytest

from octavo_gateway.registry import Endpoint
from octavo_gateway.upstream import UpstreamConnection, UpstreamPool

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


@pytest.fixture
async def endpoint() -> Endpoint:
    """A replica that answers every request in one piece."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(ANSWER)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return Endpoint("r", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


async def relayed(connection: UpstreamConnection, keeps_up: bool) -> bytes:
    received: list[bytes] = []

    def sink(data: bytes) -> bool:
        received.append(data)
        return keeps_up

    async with asyncio.timeout(5):
        await connection.send(REQUEST, b"")
        await connection.relay(sink)
    return b"".join(received)


async def test_a_reader_that_stopped_it_at_the_very_end_does_not_stop_the_next_request(endpoint: Endpoint) -> None:
    pool = UpstreamPool()
    first = await pool.connect(endpoint)
    answers = [await relayed(first, keeps_up=False)]
    pool.give_back(endpoint, first)
    second = await pool.connect(endpoint)
    answers.append(await relayed(second, keeps_up=True))
    pool.close()

    assert second is first
    assert answers == [b"hello", b"hello"]


async def test_what_a_sink_raises_reaches_whoever_relays(endpoint: Endpoint) -> None:
    connection = await UpstreamPool().connect(endpoint)

    def sink(data: bytes) -> bool:
        raise ValueError("no room")

    await connection.send(REQUEST, b"")
    with pytest.raises(ValueError, match="no room"):
        await connection.relay(sink)
    assert not connection.reusable
