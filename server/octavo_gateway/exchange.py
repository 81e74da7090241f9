"""One client request from first byte to last: named, bounded, watched for disconnect and deadline, ended once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Callable

from octavo_batches.records import BatchRecord
from octavo_gateway import headers
from octavo_gateway.asgi import EVENT_STREAM, JSON, Headers, Message, Receive, Scope, Send, header
from octavo_gateway.errors import (
    BodyTooLargeError,
    GatewayError,
    RequestTimeoutError,
    UpstreamDeadlineError,
)
from octavo_gateway.http_protocol import CLIENT, ClientConnection
from octavo_gateway.progress import Progress
from octavo_gateway.registry import Endpoint
from octavo_gateway.tenancy import Identity

BATCH = "octavo.batch"
"""Key of the `BatchRecord` in the scope of a request that this gateway makes for one of its lines."""


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to answer."""


class Exchange:
    """State of one request and the only way to answer it. `stop` ends it from outside at any point."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, clock: Callable[[], float]) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: Headers = scope["headers"]
        self.client: ClientConnection = scope.pop(CLIENT)  # left there it would close a cycle
        self.started_at = clock()
        self.request_id = headers.request_id(header(self.headers, b"x-request-id"))
        self.trace = headers.trace_of(header(self.headers, b"traceparent"))
        self.status = 0
        self.bytes_sent = 0
        self.streaming = False
        self.complete = False
        self.first_byte_at = math.nan
        self.upstream_wait_s = 0.0
        self.held_s = 0.0
        self.admitted_s = 0.0  # from arrival until a replica was asked for
        self.model = ""
        self.tenant = ""
        self.key_name = ""
        self.progress: Progress | None = None  # of a streamed answer
        self.replica: Endpoint | None = None  # the last one it was sent to
        self.route_reason = ""
        self.attempts = 0
        self.outcome = ""
        self.identity: Identity | None = None
        self.batch: BatchRecord | None = scope.get(BATCH)  # whose line this is
        self.on_end: Callable[[], None] | None = None
        self.own_headers: Headers = []  # what every answer of this exchange carries
        self.cause: BaseException | None = None
        self._clock = clock
        self._receive = receive
        self._send = send
        self.loop = self.client.loop  # asking for the running loop costs a system call each time
        self._task = asyncio.current_task(self.loop)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def endpoint(self) -> str:
        """Id of the replica it was sent to, if any."""
        return self.replica.id if self.replica is not None else ""

    @property
    def started(self) -> bool:
        """True once a status was sent."""
        return self.status != 0

    # ---- input

    async def read_body(self, limit: int, timeout_s: float) -> bytes:
        """The whole body; raises `BodyTooLargeError`, `RequestTimeoutError` or `ClientGoneError`."""
        declared = header(self.headers, b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared) > limit):
            raise BodyTooLargeError(f"The body is larger than {limit} bytes.")
        message = await (self._receive() if self.client.body_complete else self._next_message(timeout_s))
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if not message.get("more_body", False):
            body: bytes = message.get("body", b"")
            if len(body) > limit:
                raise BodyTooLargeError(f"The body is larger than {limit} bytes.")
            return body
        parts = [message.get("body", b"")]
        size = len(parts[0])
        deadline = self._clock() + timeout_s
        while message.get("more_body", False):
            message = await self._next_message(deadline - self._clock())
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise BodyTooLargeError(f"The body is larger than {limit} bytes.")
        return b"".join(parts)

    def bounded_receive(self, limit: int, timeout_s: float) -> Receive:
        """The body piece by piece, for a parser; raises as `read_body` does."""
        left, deadline = limit, self._clock() + timeout_s
        declared = header(self.headers, b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared) > limit):
            raise BodyTooLargeError(f"The body is larger than {limit} bytes.")

        async def receive() -> Message:
            nonlocal left
            message = await self._next_message(deadline - self._clock())
            left -= len(message.get("body", b""))
            if left < 0:
                raise BodyTooLargeError(f"The body is larger than {limit} bytes.")
            return message

        return receive

    async def discard_body(self, limit: int, timeout_s: float) -> None:
        """Read some of a body that is refused: a client that is still sending would not hear why."""
        deadline = self._clock() + timeout_s
        with contextlib.suppress(RequestTimeoutError, ClientGoneError):
            while limit > 0:
                message = await self._next_message(deadline - self._clock())
                limit -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

    async def _next_message(self, timeout_s: float) -> Message:
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeoutError("The request body did not arrive in time.") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    # ---- being stopped

    def watch(self, timeout_s: float) -> None:
        """From here on a disconnect or the total deadline stops this exchange."""
        self._timer = self.loop.call_later(timeout_s, self._late, timeout_s)
        self.client.watch(self._client_gone)

    def stop(self, cause: BaseException) -> None:
        """End the exchange from outside; whatever it waits for is cancelled."""
        if self.cause is None and not self.complete and self._task is not None:
            self.cause = cause
            self._task.cancel()

    def unwatch(self) -> None:
        """Stop listening; called once at the end."""
        self.client.unwatch()
        if self._timer is not None:
            self._timer.cancel()
        if self.cause is not None and self._task is not None:
            self._task.uncancel()

    def _client_gone(self) -> None:
        self.stop(ClientGoneError())

    def _late(self, timeout_s: float) -> None:
        self.stop(UpstreamDeadlineError(f"The request took longer than {timeout_s:g} s."))

    # ---- output

    async def start(self, status: int, response_headers: Headers) -> None:
        """Send status and headers."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": response_headers})

    async def write(self, data: bytes) -> None:
        """Send body bytes; waits while the client reads slowly."""
        if not self.bytes_sent:
            self.first_byte_at = self._clock()
        self.bytes_sent += len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def push(self, data: bytes) -> bool:
        """As `write` from a callback, in an event stream: False when the client reads slowly."""
        if not self.bytes_sent:
            self.first_byte_at = self._clock()
        self.bytes_sent += len(data)
        return self.client.write(data)

    async def finish(self) -> None:
        """Send the end of the body."""
        self.complete = True
        await self._send({"type": "http.response.body", "body": b""})

    async def respond(self, status: int, body: bytes, content_type: bytes = JSON, extra: Headers | None = None) -> None:
        """Send a complete answer."""
        own: Headers = [
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self.request_id.encode()),
        ]
        self.first_byte_at = self._clock()
        await self.start(status, own + (extra or []))
        self.complete = True
        self.bytes_sent = len(body)
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, extra: Headers | None = None) -> None:
        """Begin an event stream before a replica has answered, so that heartbeats can be sent."""
        own: Headers = [
            (b"content-type", EVENT_STREAM + b"; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            (b"x-request-id", self.request_id.encode()),
        ]
        self.streaming = True
        await self.start(200, own + (extra or []))

    async def fail(self, error: GatewayError) -> None:
        """Tell the client: a status if none was sent, an error event inside a stream, else a broken-off answer."""
        if not self.started:
            await self.respond(error.status, error_body(error), extra=self.own_headers + error_headers(error))
        elif self.streaming and not self.complete:
            await self.write(b"data: " + error_body(error) + b"\n\n")
            await self.finish()


def error_body(error: GatewayError) -> bytes:
    """The OpenAI error shape."""
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return json.dumps({"error": fields}, ensure_ascii=False, separators=(",", ":")).encode()


def error_headers(error: GatewayError) -> Headers:
    """Retry-After in whole seconds, rounded up; the connection closes where the body was not read."""
    own: Headers = []
    if error.retry_after_s is not None:
        own.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.status in (408, 413):
        own.append((b"connection", b"close"))
    return own
