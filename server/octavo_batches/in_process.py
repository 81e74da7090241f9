"""A request that a process makes to its own ASGI application, so that batches take the way of every request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from octavo_batches.runner import Answer

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


async def post(
    app: App,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    on_answer: Callable[[Answer], None],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """POST JSON; `on_answer` is called from within the application's last `send`. `extra` goes into the scope."""
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: MutableMapping[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("batch", 0),
        "server": ("batch", 0), "headers": [(b"content-type", b"application/json"), *named], **(extra or {}),
    }  # fmt: skip
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    start: MutableMapping[str, Any] = {}
    parts: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        for message in messages:
            return message
        await asyncio.Event().wait()  # the client stays until it has its answer
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
            after = found.get("retry-after")
            on_answer(
                Answer(
                    start["status"], b"".join(parts), found.get("x-request-id", ""),
                    float(after) if after is not None and after.isdigit() else None,
                )
            )  # fmt: skip

    await app(scope, receive, send)
