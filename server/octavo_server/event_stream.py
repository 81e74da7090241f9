"""Server-sent events with little work per token."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo_server.errors import ApiError

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def encode_event(value: Any) -> bytes:
    """One `data:` event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


class Closing(Protocol):
    """Something that holds engine resources until closed."""

    async def aclose(self) -> None: ...


class EventStream(Response):
    """Sends events as they come; `source` is closed whatever ends the response, even before the first event.

    The boundary cancels the task on disconnect, so nothing here listens for the client.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: Closing, headers: Mapping[str, str] | None = None
    ) -> None:
        self._events = events
        self._source = source
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._source), contextlib.aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def guarded(
    events: AsyncGenerator[bytes, None],
    *,
    request_id: str,
    on_error: Callable[[ApiError], None],
    done: bytes = DONE,
) -> AsyncGenerator[bytes, None]:
    """Pass `events` on, turn a failure under way into an error event, and end with `[DONE]`."""
    async with contextlib.aclosing(events):
        try:
            async for event in events:
                yield event
        except ApiError as error:
            on_error(error)
            logging.getLogger("octavo.server").warning("stream %s ended early: %s", request_id, error.reason)
            yield encode_event(error.body())
    yield done
