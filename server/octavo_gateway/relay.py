"""Passes a replica's answer to the client as it comes: events whole, other bytes as they are, silence bounded."""

from __future__ import annotations

from octavo_gateway.errors import UpstreamDeadlineError
from octavo_gateway.exchange import Exchange
from octavo_gateway.progress import Progress
from octavo_gateway.sse import EventRelay
from octavo_gateway.upstream import ConnectionLostError, ResponseHead, UpstreamConnection
from octavo_gateway.usage import UsageMeter

MAX_ERROR_BYTES = 64 * 1024

ENDS_WITH_DONE = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Streams whose last event tells that they are whole, for replicas whose connection's end could mean anything."""


async def relay_answer(
    exchange: Exchange,
    connection: UpstreamConnection,
    head: ResponseHead,
    meter: UsageMeter,
    progress: Progress,
    idle_timeout_s: float,
) -> None:
    """Relay the body to its end, without ending the client's. Raises `UpstreamError` when it breaks off.

    When nothing moves for `idle_timeout_s`, from the replica or to the client, the exchange is stopped.
    """
    idle = _IdleTimer(exchange, idle_timeout_s)
    try:
        if exchange.streaming:
            await _relay_events(exchange, connection, head, meter, progress, idle)
        else:
            await _relay_bytes(exchange, connection, meter, idle)
    finally:
        idle.cancel()


async def refusal_in_stream(exchange: Exchange, connection: UpstreamConnection) -> None:
    """Heartbeats have begun a 200 stream, and now the replica answers with an error document: make it an event."""
    document = b""
    while (data := await connection.read()) and len(document) < MAX_ERROR_BYTES:
        document += data
    flat = document.replace(b"\r", b"").replace(b"\n", b" ")
    await exchange.write(b"data: " + flat + b"\n\n")
    await exchange.finish()


async def _relay_events(
    exchange: Exchange,
    connection: UpstreamConnection,
    head: ResponseHead,
    meter: UsageMeter,
    progress: Progress,
    idle: _IdleTimer,
) -> None:
    """Events go from socket to socket inside one callback: no task wakes for them."""
    relay = EventRelay()

    def pass_on(data: bytes) -> bool:
        idle.touch()
        events = meter.feed_events(relay.feed(data))
        if progress.active:
            events = progress.feed(events)
        return exchange.push(events) if events else True

    exchange.client.on_writable = connection.resume
    await connection.relay(pass_on)
    if rest := relay.rest():
        await exchange.write(rest)
    if not head.framed and head.status == 200 and exchange.path in ENDS_WITH_DONE and not relay.done:
        raise ConnectionLostError("the stream ended without [DONE]", reused=False)


async def _relay_bytes(exchange: Exchange, connection: UpstreamConnection, meter: UsageMeter, idle: _IdleTimer) -> None:
    while data := await connection.read():
        idle.touch()
        meter.feed_body(data)
        await exchange.write(data)
    meter.finish_body()


class _IdleTimer:
    """Stops an exchange in which nothing has moved for a while; touching it costs one clock read."""

    __slots__ = ("_at", "_exchange", "_handle", "_loop", "_timeout_s")

    def __init__(self, exchange: Exchange, timeout_s: float) -> None:
        self._loop = exchange.loop
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._at = self._loop.time()
        self._handle = self._loop.call_later(timeout_s, self._check)

    def touch(self) -> None:
        self._at = self._loop.time()

    def cancel(self) -> None:
        self._handle.cancel()

    def _check(self) -> None:
        left = self._at + self._timeout_s - self._loop.time()
        if left > 0:
            self._handle = self._loop.call_later(left, self._check)
        else:
            self._exchange.stop(UpstreamDeadlineError(f"The answer stood still for {self._timeout_s:g} s."))
