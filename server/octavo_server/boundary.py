"""The outermost ASGI layer: one place where a request is named, limited, admitted, watched and ended.

It reads the whole body (bounded), runs the application in a task of its own and listens for the client meanwhile:
a disconnect, the request timeout and the end of a drain all cancel that task, so every face frees its sequences the
same way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from opentelemetry.trace import Span

from octavo_server.errors import ApiError, bad_request
from octavo_server.lifecycle import InFlight, Lifecycle
from octavo_server.limits import LIMITS
from octavo_server.metrics import Metrics
from octavo_server.telemetry import Telemetry, context_of
from octavo_server.usage_log import USAGE_ID_HEADER, Consumption, UsageLog, usage_id_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
RenderError = Callable[[str, ApiError], bytes]

logger = logging.getLogger("octavo.server")

# Probes and scrapes are answered whatever the replica's phase, and are not worth a log line.
OBSERVATION_PATHS = frozenset(
    {"/health", "/health/live", "/health/ready", "/ping", "/metrics", "/load", "/version", "/v2/health/live",
     "/v2/health/ready", "/usage"}
)  # fmt: skip
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestBoundary:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: App,
        *,
        lifecycle: Lifecycle,
        metrics: Metrics,
        telemetry: Telemetry,
        usage: UsageLog,
        render_error: RenderError,
        max_body_bytes: int,
        request_timeout_s: float,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._telemetry = telemetry
        self._usage = usage
        self._render_error = render_error
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OBSERVATION_PATHS:
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        span = self._start_span(scope)
        usage_id = usage_id_of(_header(scope, USAGE_ID_HEADER))
        consumed = scope.setdefault("state", {})["consumed"] = Consumption()
        self._usage.begin(usage_id)
        try:
            exchange.request_id = _request_id(scope)
            await self._serve(exchange, scope, receive)
        except ApiError as error:
            self._metrics.rejected(error.reason)
            await exchange.send_error(error, self._render_error(scope["path"], error))
        except _ClientGoneError:
            exchange.status = 499
        finally:
            self._usage.end(usage_id, consumed)
            self._telemetry.end_request(span, exchange.status)
            _log_exchange(exchange, scope, consumed)

    def _start_span(self, scope: Scope) -> Span | None:
        if not self._telemetry.enabled:
            return None
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        span = self._telemetry.start_request(scope["method"], scope["path"], headers)
        scope.setdefault("state", {})["trace_context"] = context_of(span)
        return span

    async def _serve(self, exchange: _Exchange, scope: Scope, receive: Receive) -> None:
        in_flight = InFlight(exchange.request_id)
        scope.setdefault("state", {})["arrived_at"] = exchange.started_at
        if scope["method"] == "POST":
            self._lifecycle.admit(in_flight)
        try:
            body = await self._read_body(scope, receive)
            await self._run(exchange, scope, receive, body, in_flight)
        finally:
            self._lifecycle.release(in_flight)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        declared = _header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(LIMITS.body_read_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive within {LIMITS.body_read_timeout_s:g} s.", reason="body_timeout"
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._max_body_bytes} bytes.", reason="body_too_large")

    async def _run(self, exchange: _Exchange, scope: Scope, receive: Receive, body: bytes, in_flight: InFlight) -> None:
        """Run the application; end it when the client leaves or the time is up."""
        replay = _Replay(body)
        task: asyncio.Task[None] = asyncio.ensure_future(self._app(scope, replay, exchange.send))
        in_flight.bind(task)
        watcher = asyncio.ensure_future(_stop_on_disconnect(receive, in_flight))
        timer = asyncio.get_running_loop().call_later(self._request_timeout_s, in_flight.stop, self._timed_out())
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():  # this very coroutine is being cancelled, not the request
                in_flight.stop(None)
                raise
            if in_flight.stop_cause is not None:
                raise in_flight.stop_cause from None
            raise _ClientGoneError from None
        except ApiError:
            raise
        except Exception as error:
            _log_without_values(exchange.request_id, error)
            raise ApiError(
                500, f"Internal error; the server's log has the details under request id {exchange.request_id}."
            ) from None
        finally:
            timer.cancel()
            watcher.cancel()
            task.cancel()

    def _timed_out(self) -> ApiError:
        return ApiError(504, f"The request took longer than {self._request_timeout_s:g} s.", reason="request_timeout")


class _ClientGoneError(Exception):
    """The client closed the connection."""


class _Exchange:
    """What goes back to the client, and what the log line needs of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = uuid.uuid4().hex
        self.status = 0
        self.started_at = time.monotonic()
        self._send = send
        self._complete = False
        self._streams_events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            self._streams_events = (b"content-type", b"text/event-stream; charset=utf-8") in headers
            message["headers"] = [*headers, (b"x-request-id", self.request_id.encode())]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def send_error(self, error: ApiError, body: bytes) -> None:
        """Send the error; a stream under way gets it as its last event."""
        if self.status == 0:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(name.encode(), value.encode()) for name, value in error.headers().items()]
            if error.status in (408, 413):
                headers.append((b"connection", b"close"))  # the rest of the body was not read
            await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
        elif not self._complete:
            ending = b"data: " + body + b"\n\ndata: [DONE]\n\n" if self._streams_events else b""
            await self.send({"type": "http.response.body", "body": ending})


class _Replay:
    """`receive` for the application: the body once, then silence; the boundary itself watches the connection."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _stop_on_disconnect(receive: Receive, in_flight: InFlight) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    in_flight.stop(None)


def _request_id(scope: Scope) -> str:
    """The caller's X-Request-Id when it is harmless, else a new one."""
    given = _header(scope, b"x-request-id")
    if given is None:
        return uuid.uuid4().hex
    text = given.decode("latin-1")
    if not _REQUEST_ID.fullmatch(text):
        raise bad_request(
            "X-Request-Id: must be 1 to 128 characters out of letters, digits and ._:/+=@-", "X-Request-Id"
        )
    return text


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _log_exchange(exchange: _Exchange, scope: Scope, consumed: Consumption) -> None:
    fields = {
        "request_id": exchange.request_id,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": exchange.status,
        "seconds": round(time.monotonic() - exchange.started_at, 4),
        **scope.get("state", {}).get("log_fields", {}),
    }
    if consumed.prompt_tokens:  # of requests that were given up, too
        fields["prompt_tokens"] = consumed.prompt_tokens
        fields["cached_tokens"] = consumed.cached_tokens
        fields["completion_tokens"] = consumed.output_tokens
    logger.info("request %s", json.dumps(fields), extra={"fields": fields})


def _log_without_values(request_id: str, error: Exception) -> None:
    """Log where it happened but not what the exception says: its message may quote a prompt."""
    frames = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
    logger.error("request %s failed with %s at\n%s", request_id, type(error).__name__, frames)
