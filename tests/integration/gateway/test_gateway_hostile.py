"""What attackers send: requests that two parsers might read differently, and fishing in error messages."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

import pytest

from fakes.gateway_door import HELLO, Door, entry, open_door
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import HoldPolicy, ModelEntry, RetryPolicy

BODY = json.dumps(HELLO).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
HIDDEN = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"

AMBIGUOUS = {
    "both a length and chunks": HEAD + LENGTH + b"transfer-encoding: chunked\r\n\r\n" + CHUNKED + HIDDEN,
    "two lengths": HEAD + LENGTH + b"content-length: 4\r\n\r\n" + BODY + HIDDEN,
    "a negative length": HEAD + b"content-length: -1\r\n\r\n" + BODY,
    "a signed length": HEAD + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY,
    "an unknown coding after chunked": HEAD + b"transfer-encoding: chunked, identity\r\n\r\n" + CHUNKED,
    "a space before the colon": HEAD + b"content-length : %d\r\n\r\n" % len(BODY) + BODY,
    "a bare line feed in a header": HEAD + LENGTH + b"x: a\nx-octavo-tenant: other\r\n\r\n" + BODY,
    "a chunk size out of range": HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + BODY,
}


async def send(door: Door, request: bytes) -> bytes:
    """All bytes of the answer; the connection is closed by whoever wants to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
    try:
        writer.write(request)
        writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("case", list(AMBIGUOUS))
async def test_a_request_that_could_be_read_in_two_ways_reaches_no_replica(case: str) -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica)) as door:
        answer = await send(door, AMBIGUOUS[case])

    assert replica.received == []
    assert answer.count(b"HTTP/1.1") <= 1  # what was hidden inside is no request of its own
    assert not answer or answer.split()[1] == b"400"


LEAKS = re.compile(
    r"\d+\.\d+\.\d+\.\d+|localhost|:\d{4,5}\b|/[a-z_]+/[a-z_]+\.py|Traceback|0x[0-9a-f]{6}|octavo_gateway|site-packages"
)


async def test_no_error_tells_an_address_a_path_or_an_internal() -> None:
    """Every way to fail that a client can provoke, in OpenAI's shape and without a word about what is behind it."""
    async with OpenAIReplica("gone").serve() as gone:
        pass
    async with (
        OpenAIReplica("dropping", drop_before_head=True).serve() as dropping,
        OpenAIReplica("silent", first_byte_delay=30).serve() as silent,
        open_door(
            entry(gone, name="gone", retry=RetryPolicy(attempts=1)),
            entry(dropping, name="dropping", retry=RetryPolicy(attempts=1)),
            entry(silent, name="silent"),
            ModelEntry(name="cold", scale_to_zero=True, desired_replicas=0, hold=HoldPolicy(5, 0.2)),
            ModelEntry(name="suspended", desired_replicas=0),
            first_byte_timeout=0.3,
            max_body_bytes=2_048,
        ) as door,
    ):

        def ask(**fields: object) -> Callable[[], Awaitable[tuple[int, str, dict[str, str]]]]:
            return lambda: door.read(HELLO | fields)

        attempts = {
            "unreachable": (502, ask(model="gone")),
            "broken": (502, ask(model="dropping")),
            "silent": (504, ask(model="silent")),
            "cold": (503, ask(model="cold")),
            "suspended": (503, ask(model="suspended")),
            "unknown": (404, ask(model="../../etc/passwd")),
            "no model": (400, ask(model=None)),
            "wrong type": (400, ask(model={"a": 1})),
            "too large": (413, ask(padding="x" * 4_096)),
            "not JSON": (400, lambda: _raw(door, b"\xff{")),
            "no such route": (404, lambda: door.read(HELLO, path="/v1/../admin")),
            "wrong method": (405, lambda: _get(door, "/v1/chat/completions")),
        }
        for name, (expected, attempt) in attempts.items():
            status, text, _ = await attempt()
            error = json.loads(text)["error"]
            assert status == expected, f"{name}: {status} {text}"
            assert error.keys() == {"message", "type", "param", "code"}, name
            assert LEAKS.search(text) is None, f"{name}: {text}"


async def _raw(door: Door, body: bytes) -> tuple[int, str, dict[str, str]]:
    headers = {"content-type": "application/json"}
    async with door.http.post(door.url + "/v1/chat/completions", data=body, headers=headers) as response:
        return response.status, await response.text(), {}


async def _get(door: Door, path: str) -> tuple[int, str, dict[str, str]]:
    async with door.http.get(door.url + path) as response:
        return response.status, await response.text(), {}
