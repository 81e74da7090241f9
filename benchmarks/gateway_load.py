"""The two ends of a gateway measurement: a mock replica and a client, both as cheap as Python can be.

The replica streams `max_tokens` events on a fixed beat; each carries the time at which it was written, so that the
client, on the same machine, knows how long every single event was under way. Without `"stream": true` it answers at
once. The client checks every answer.

    python benchmarks/gateway_load.py replica PORT
    python benchmarks/gateway_load.py client '{"port": ..., "streams": ...}'    # the fields of `Load`
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass, field

import httptools
import uvloop

PACE_S = 0.05
KEY = "sk-benchmark-4f1c2b7a9d3e4c5f8a6b7c8d9e0f1a2b"  # LiteLLM refuses to start without one
_HEAD = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
EVENT = _HEAD + b'"delta":{"content":"%019d"},"finish_reason":null}]}\n\n'
LAST = _HEAD + b'"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
USAGE = b'"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}'
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%019d"},"finish_reason":"stop"}],' + USAGE + b"}"
)
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"x"}]}'
_MAX_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
_STREAM = re.compile(rb'"stream":\s*true')
_STAMP = re.compile(rb'"content":\s*"(\d{19})"')


class Replica(asyncio.Protocol):
    """Speaks just enough HTTP/1.1."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.url = b""
        self.body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        if self.url.startswith((b"/health", b"/v1/models")):
            self.answer(b"200 OK", MODELS)
        elif self.url.startswith(b"/metrics"):
            self.answer(b"404 Not Found", b"")
        else:
            body = b"".join(self.body)
            if _STREAM.search(body) is None:
                self.answer(b"200 OK", WHOLE % time.monotonic_ns())
                return
            asked = _MAX_TOKENS.search(body)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self.transport.write(head)
            self.tick(int(asked[1]) if asked else 1, self.loop.time())

    def answer(self, status: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)

    def tick(self, left: int, due: float) -> None:
        """The next event; the beat is absolute, so that streams do not drift into step with each other."""
        if self.transport.is_closing():
            return
        if left:
            event = EVENT % time.monotonic_ns()
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.loop.call_at(due + PACE_S, self.tick, left - 1, due + PACE_S)
        else:
            self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(LAST), LAST))


@dataclass(frozen=True)
class Load:
    """What a client asks for. `streams` connections, each with one request at a time and `requests` in all after one
    that warms it up; with `interval_s` a connection begins one every so many seconds instead of one after the other.
    `unique`: every prompt is another one."""

    port: int
    streams: int
    requests: int
    events: int = 20  # of a streamed answer; 0: ask for a whole one
    body_bytes: int = 400
    interval_s: float = 0.0
    unique: bool = False

    def request(self, number: int) -> bytes:
        """One request's bytes."""
        words = f"request {number} " if self.unique else "hello there "
        text = (words * (self.body_bytes // len(words) + 1))[: self.body_bytes]
        fields: dict[str, object] = {"model": "m", "max_tokens": max(1, self.events), "stream": self.events > 0}
        body = json.dumps(fields | {"messages": [{"role": "user", "content": text}]}).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b" % (KEY.encode(), len(body), body)
        )


@dataclass
class Seen:
    """Times of one client, in seconds: until the first byte, of events under way, of whole answers."""

    first: list[float] = field(default_factory=list)
    transit: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Medians and 99th percentiles."""
        found: dict[str, object] = {"requests": len(self.total), "errors": len(self.errors)}
        found["error"] = self.errors[0] if self.errors else None
        for name in ("first", "transit", "total"):
            times = sorted(getattr(self, name))
            for percent in (50, 99):
                found[f"{name}_p{percent}"] = times[int(len(times) * percent / 100)] if times else None
        return found


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes, seen: Seen | None) -> asyncio.Future[None]:
        """Send a request; its times are added to `seen`. Fails when the answer is wrong."""
        self.done = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.seen = seen
        self.tail = b""
        self.events = 0
        self.first = 0.0
        self.began = time.perf_counter()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        now = time.monotonic_ns()
        if not self.first:
            self.first = time.perf_counter() - self.began
        self.tail = (self.tail + body)[-400:] if len(body) < 400 else body
        for stamp in _STAMP.findall(body):
            self.events += 1
            if self.seen is not None:
                self.seen.transit.append((now - int(stamp)) / 1e9)

    def on_message_complete(self) -> None:
        if self.done is None or self.done.done():
            return
        whole = b"[DONE]" in self.tail if self.load.events else True
        if self.parser.get_status_code() != 200 or self.events != max(1, self.load.events) or not whole:
            self.done.set_exception(RuntimeError(f"wrong answer after {self.events} events: {self.tail!r}"))
            return
        if self.seen is not None:
            self.seen.first.append(self.first)
            self.seen.total.append(time.perf_counter() - self.began)
        self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(RuntimeError("connection lost"))


async def drive(load: Load, seen: Seen) -> None:
    """Put the load on the gateway; arrivals are spread over one answer's time (or over one interval)."""
    loop = asyncio.get_running_loop()
    spread_s = load.interval_s or load.events * PACE_S
    began = loop.time()
    numbers = itertools.count()

    async def one(index: int) -> None:
        due = began + index / load.streams * spread_s
        await asyncio.sleep(due - loop.time())
        client: Client
        _, client = await loop.create_connection(lambda: Client(load), "127.0.0.1", load.port)
        request = load.request(next(numbers))
        for turn in range(load.requests + 1):
            try:
                await client.ask(request, seen if turn else None)
            except RuntimeError as error:
                seen.errors.append(str(error)[:300])
                return
            if load.unique:
                request = load.request(next(numbers))
            if load.interval_s:
                due += load.interval_s
                await asyncio.sleep(max(0.0, due - loop.time()))
        client.transport.close()

    await asyncio.gather(*(one(index) for index in range(load.streams)))


async def _replica(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Replica, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    if sys.argv[1] == "replica":
        uvloop.run(_replica(int(sys.argv[2])))
    else:
        seen = Seen()
        uvloop.run(drive(Load(**json.loads(sys.argv[2])), seen))
        print(json.dumps(seen.summary()))


if __name__ == "__main__":
    main()
