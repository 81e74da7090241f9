"""A replica that speaks OpenAI's HTTP over a real socket, whose load, pace and failures a test decides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn


@dataclass
class Received:
    """One request as the replica saw it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class OpenAIReplica:
    """Behaviour may be changed while it runs. Times in seconds."""

    name: str = "replica"
    tokens: int = 5
    token_delay: float = 0.0
    first_byte_delay: float = 0.0
    die_after: int | None = None  # tokens after which the connection breaks off
    drop_before_head: bool = False  # the connection breaks off without any answer
    refuse_with: int | None = None  # answer every request with this status
    split_events: bool = False  # send each event in two pieces
    metrics: str | None = None
    ready: bool = True
    cached_tokens: int = 0
    response_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    running: int = 0
    peak_running: int = 0
    finished: int = 0
    disconnects: int = 0
    port: int = 0
    scheme: str = "http"
    _server: _Server | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def serve(self, port: int = 0, **tls: Any) -> AsyncIterator[OpenAIReplica]:
        """Listen until the context ends; open connections are cut then, as when a process is killed.

        `tls`: uvicorn's `ssl_*` settings.
        """
        self.scheme = "https" if tls else "http"
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app, interface="asgi3", lifespan="off", log_config=None, access_log=False, ws="none", **tls
        )
        self._server = server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        try:
            yield self
        finally:
            server.kill()
            await task

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/metrics":
            await _answer(send, 200 if self.metrics is not None else 404, (self.metrics or "").encode(), b"text/plain")
            return
        if path.startswith("/health"):
            await _answer(send, 200 if self.ready else 503, b"{}")
            return
        if path == "/usage":
            await _answer(send, 404, b"{}")
            return
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.received.append(Received(path, headers, body))
        self.running += 1
        self.peak_running = max(self.peak_running, self.running)
        over = False

        async def send_and_count(message: Any) -> None:
            """A request is over when its last byte leaves, not when this task next runs."""
            nonlocal over
            if message["type"] == "http.response.body" and not message.get("more_body") and not over:
                over = True
                self.running -= 1
            await send(message)

        work = asyncio.ensure_future(self._work(scope, body, send_and_count))
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.disconnects += 1
                work.cancel()
                return
            await work
            self.finished += 1
        finally:
            left.cancel()
            self.running -= not over

    async def _work(self, scope: Any, body: bytes, send: Any) -> None:
        path = scope["path"]
        await asyncio.sleep(self.first_byte_delay)
        if self.drop_before_head:
            self._cut(scope)
            await asyncio.sleep(10)
        if self.refuse_with is not None:
            error = {"error": {"message": f"{self.name} says no", "type": "x", "param": None, "code": "refused"}}
            await _answer(send, self.refuse_with, json.dumps(error).encode())
            return
        if not path.startswith("/v1/"):
            await _answer(send, 200, b'{"echo":' + str(len(body)).encode() + b"}")
            return
        request = json.loads(body)
        if request.get("stream"):
            await self._stream(request, send)
        else:
            await asyncio.sleep(self.token_delay * self.tokens)
            await _answer(send, 200, json.dumps(self._completion(request)).encode(), extra=self.response_headers)

    def _cut(self, scope: Any) -> None:
        assert self._server is not None
        for connection in list(self._server.server_state.connections):
            if connection.scope is scope:
                connection.transport.abort()

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": 7,
            "completion_tokens": self.tokens,
            "total_tokens": 7 + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
        text = " ".join(f"{self.name}-{i}" for i in range(self.tokens))
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": self._usage(),
        }

    async def _stream(self, request: dict[str, Any], send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *self.response_headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(self.tokens):
            if self.die_after is not None and number >= self.die_after:
                raise _BrokenOffError
            await self._event(send, _chunk(request, f"{self.name}-{number} ", None))
            await asyncio.sleep(self.token_delay)
        await self._event(send, _chunk(request, "", "stop"))
        if (request.get("stream_options") or {}).get("include_usage"):
            await self._event(send, {**_chunk(request, "", None), "choices": [], "usage": self._usage()})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _event(self, send: Any, chunk: dict[str, Any]) -> None:
        event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        pieces = [event[:20], event[20:]] if self.split_events else [event]
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if self.split_events:
                await asyncio.sleep(0.001)


class _BrokenOffError(Exception):
    """Makes uvicorn cut the connection."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def kill(self) -> None:
        self.should_exit = True
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _answer(
    send: Any, status: int, body: bytes, content_type: bytes = b"application/json", extra: Any = ()
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _chunk(request: dict[str, Any], text: str, finish_reason: str | None) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": request["model"],
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}],
    }
