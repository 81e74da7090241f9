"""One HTTP/1.1 connection to a replica: write a request, await its head, read the body as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

HIGH_WATER_BYTES = 256 * 1024
"""Unread body bytes at which reading from the replica pauses until the client has caught up."""

MAX_HEAD_BYTES = 64 * 1024


class UpstreamError(Exception):
    """The exchange with a replica failed. The message is for the log; it never reaches a client."""


class ConnectError(UpstreamError):
    """No connection was made, so the replica has seen nothing of the request."""


class ConnectionLostError(UpstreamError):
    """The connection broke before the answer was complete. `reused`: it had carried an earlier request."""

    def __init__(self, message: str, *, reused: bool) -> None:
        super().__init__(message)
        self.reused = reused


class BrokenResponseError(UpstreamError):
    """What the replica sent is not HTTP, or beyond the limits."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status and headers (names lower case). `framed`: the end of the body is told by length or chunks, not by EOF."""

    status: int
    headers: list[tuple[bytes, bytes]]
    framed: bool

    def get(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None


class UpstreamConnection(asyncio.Protocol):
    """Carries one request at a time. After `read` returned b"" it may be reused if `reusable`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._sink: Callable[[bytes], bool] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._head: ResponseHead | None = None
        self._complete = True
        self._error: Exception | None = None
        self._keep_alive = False
        self.requests = 0
        self._idle_since = 0.0

    @property
    def reusable(self) -> bool:
        """True when another request may be written to this connection."""
        return self._complete and self._error is None and self._transport is not None and self._keep_alive

    @property
    def idle_s(self) -> float:
        """Seconds since `rest`."""
        return self._loop.time() - self._idle_since

    def rest(self) -> None:
        """Note that the connection is idle from now on."""
        self._idle_since = self._loop.time()

    async def send(self, head: bytes, body: bytes) -> ResponseHead:
        """Write one request and wait for the answer's head. Raises `UpstreamError`."""
        self._begin()
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionLostError("closed before the request was written", reused=self.requests > 1)
        transport.write(head + body if len(body) < 16_384 else head)
        if len(body) >= 16_384:
            transport.write(body)
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._head

    async def relay(self, sink: Callable[[bytes], bool]) -> None:
        """Hand the body to `sink` as it arrives, inside the callback that received it, until its end.

        After `sink` returned False nothing more is read until `resume`. Raises `UpstreamError` if the body breaks off,
        and what `sink` raises.
        """
        self._sink = sink
        try:
            if self._chunks:
                self._drain(sink)
            while not self._complete and self._error is None:
                await self._wait()
            if self._error is not None:
                raise self._error
        finally:
            self._sink = None

    def resume(self) -> None:
        """Read on after a pause."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    async def read(self) -> bytes:
        """The next bytes of the body, all that are there; b"" at its end. Raises `UpstreamError` if it breaks off."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._complete:
                return b""
            await self._wait()
        data = self._take()
        self.resume()
        return data

    def abort(self) -> None:
        """Close at once; the replica sees the disconnect and stops generating."""
        if self._transport is not None:
            self._transport.abort()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks.clear()
        self._buffered = 0
        self._headers = []
        self._head_bytes = 0
        self._head = None
        self._complete = False
        self._keep_alive = False
        self.resume()  # its last reader may have stopped it with the very bytes that ended the answer
        self.requests += 1

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        return data

    def _drain(self, sink: Callable[[bytes], bool]) -> None:
        try:
            if not sink(self._take()):
                self._pause()
        except Exception as error:  # a callback has no caller to tell: `relay` raises it
            self._fail(error)
            self.abort()

    def _pause(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._complete or self._parser is None:
            self._fail(BrokenResponseError("sent bytes that belong to no request"))
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BrokenResponseError(f"sent no valid HTTP ({type(error).__name__})"))
            self.abort()
            return
        if self._sink is not None:
            if self._chunks:
                self._drain(self._sink)
            if self._complete:
                self._wake()
            return
        if self._buffered > HIGH_WATER_BYTES:
            self._pause()
        self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._parser = None
        if not self._complete:
            if self._head is not None and not self._head.framed and exc is None:
                self._complete = True
            else:
                why = f": {exc}" if exc else ""
                self._fail(ConnectionLostError(f"connection lost{why}", reused=self.requests > 1))
        self._wake()

    # ---- httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail(BrokenResponseError(f"sent more than {MAX_HEAD_BYTES} bytes of headers"))
            self.abort()
            return
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = cast(httptools.HttpResponseParser, self._parser)
        status = parser.get_status_code()
        if status < 200:
            return
        names = {name for name, _ in self._headers}
        framed = b"content-length" in names or b"transfer-encoding" in names or status in (204, 304)
        self._keep_alive = parser.should_keep_alive() and framed
        self._head = ResponseHead(status, self._headers, framed)

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self._head is None:  # an interim 1xx answer; the real one follows
            self._headers = []
            return
        self._complete = True
