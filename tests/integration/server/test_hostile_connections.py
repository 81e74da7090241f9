"""Connections that do not behave: heads without end, bodies that never come, readers that do not read."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine
from octavo_server import boundary, http_protocol
from octavo_server.limits import LIMITS

Serve = Callable[..., Any]


async def connect(server: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(server.url)
    return await asyncio.open_connection(address.hostname, address.port)


@pytest.mark.parametrize("head", [b"X-A: " + b"a" * 100_000, b"X-A: b\r\n" * 13_000], ids=["one", "many"])
async def test_a_head_without_end_is_cut_off(serve: Serve, head: bytes) -> None:
    server = await serve()
    reader, writer = await connect(server)

    writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n" + head)

    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 431 ")
    writer.close()


async def test_a_head_that_never_ends_is_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "LIMITS", dataclasses.replace(LIMITS, head_read_timeout_s=0.1))
    server = await serve()
    reader, writer = await connect(server)

    writer.write(b"GET /version HTTP/1.1\r\nHo")

    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_a_body_that_never_comes_is_408(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "LIMITS", dataclasses.replace(LIMITS, body_read_timeout_s=0.1))
    server = await serve()
    reader, writer = await connect(server)

    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")

    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 408 ")
    assert server.replica.lifecycle.num_in_flight == 0
    writer.close()


async def test_a_connection_may_be_used_again_and_again(serve: Serve) -> None:
    server = await serve()
    reader, writer = await connect(server)

    for _ in range(50):
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\nX-Filler: " + b"a" * 4_000 + b"\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        await reader.readuntil(b"}")
    writer.close()


async def test_a_reader_that_does_not_read_holds_only_its_own_stream(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: "x" * 3_000, max_model_len=100_000))
    reader, writer = await connect(server)
    body = b'{"prompt": "Hi", "max_tokens": 60000, "ignore_eos": true, "stream": true}'

    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await reader.read(100)
    for _ in range(3):
        status, _, _ = await server.post("/v1/completions", {"prompt": "Hi"})
        assert status == 200
    writer.transport.abort()

    await eventually(lambda: server.engine.running == {})
