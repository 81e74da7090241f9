"""uvicorn's HTTP/1.1 protocol with what it lacks: bounds on header bytes and on the time for a head to arrive, and a
way to write and to hear of a disconnect without a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

CLIENT = "octavo.client"
"""Key of the `ClientConnection` in the ASGI scope."""

TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s"
)
BODY = (
    b'{"error":{"message":"The request headers are too large.","type":"invalid_request_error",'
    b'"param":null,"code":"headers_too_large"}}'
)


class ClientConnection:
    """The client's side of one request, for what ASGI has no words for. Used from callbacks, so nothing here waits."""

    __slots__ = ("_cycle", "_on_gone", "loop", "on_writable")

    def __init__(self, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle = cycle
        self.loop = loop
        self._on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    @property
    def body_complete(self) -> bool:
        """True when the whole request body has arrived."""
        return not self._cycle.more_body

    @property
    def answered(self) -> bool:
        return self._cycle.response_complete

    def watch(self, on_gone: Callable[[], None]) -> None:
        """From here on call `on_gone` when the client disconnects; at once if it has."""
        self._on_gone = on_gone
        self._cycle.flow.resume_reading()  # paused after a large body, it would not hear of a disconnect
        if self._cycle.disconnected:
            on_gone()

    def unwatch(self) -> None:
        self._on_gone = self.on_writable = None

    def write(self, data: bytes) -> bool:
        """Send a piece of a chunked answer whose head was sent. False: wait for `on_writable` before the next."""
        cycle = self._cycle
        if not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return not cycle.flow.write_paused

    def gone(self) -> None:
        """The protocol tells that the connection is lost."""
        if self._on_gone is not None:
            self._on_gone()

    def writable(self) -> None:
        """The protocol tells that its buffer has room again."""
        if self.on_writable is not None:
            self.on_writable()


def bounded_protocol(max_header_bytes: int, header_timeout_s: float) -> type[HttpToolsProtocol]:
    """A protocol class with these bounds; a slow or endless head costs its sender the connection."""

    class BoundedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None
        _refused = False
        _clients: tuple[ClientConnection, ...] = ()  # more than one only where requests are pipelined

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(header_timeout_s, self._head_late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)
            clients, self._clients = self._clients, ()
            for client in clients:
                client.gone()

        def resume_writing(self) -> None:
            super().resume_writing()
            for client in self._clients:
                client.writable()

        def data_received(self, data: bytes) -> None:
            if not self._refused:
                super().data_received(data)

        def on_message_begin(self) -> None:
            self._head_bytes = 0
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(header_timeout_s, self._head_late)
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            if self._grow(len(url)):
                super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._grow(len(name) + len(value) + 4):
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._stop_timer()
            if not self._refused:
                super().on_headers_complete()
                client = ClientConnection(self.cycle, self.loop)
                self._clients = (*(c for c in self._clients if not c.answered), client)
                cast(dict[str, object], self.scope)[CLIENT] = client

        def on_body(self, body: bytes) -> None:
            if not self._refused:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._refused:
                super().on_message_complete()

        def _grow(self, count: int) -> bool:
            self._head_bytes += count
            if self._head_bytes > max_header_bytes and not self._refused:
                self._refused = True
                self.transport.write(TOO_LARGE % (len(BODY), BODY))
                self.transport.close()
            return not self._refused

        def _head_late(self) -> None:
            self._head_timer = None
            self.transport.close()

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedProtocol
