"""Which headers cross the gateway. Towards replicas an allow-list; towards clients all but hop-by-hop ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from octavo_gateway.asgi import Headers

FORWARDED = frozenset(
    {
        b"accept",
        b"content-type",
        b"user-agent",
        b"tracestate",
        b"anthropic-version",
        b"anthropic-beta",
        b"inference-header-content-length",
    }
)
"""Request headers a replica may see. Credentials, cookies, x-octavo-* and x-forwarded-* of clients never pass."""

NOT_RETURNED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"date",
        b"server",
        b"set-cookie",
        b"x-request-id",
    }
)
"""Response headers that end here: hop-by-hop ones, and those this gateway sets itself."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def request_id(given: bytes | None) -> str:
    """The caller's id when it is harmless, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return os.urandom(16).hex()


class Trace(NamedTuple):
    """W3C trace context of one request. `parent_span_id` is the caller's, empty when the trace starts here."""

    trace_id: str
    span_id: str
    parent_span_id: str
    flags: str

    @property
    def header(self) -> bytes:
        """`traceparent` for the replica: this gateway's span is its parent."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}".encode()


def trace_of(given: bytes | None) -> Trace:
    """Continue the caller's trace when its `traceparent` is valid, else start one."""
    match = _TRACEPARENT.fullmatch(given) if given is not None else None
    if match is None or set(match[1]) == {ord("0")} or set(match[2]) == {ord("0")}:
        return Trace(os.urandom(16).hex(), os.urandom(8).hex(), "", "01")
    return Trace(match[1].decode(), os.urandom(8).hex(), match[2].decode(), match[3].decode())


def request_head(
    method: str, target: bytes, host: str, headers: Headers, body_length: int, own: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """The bytes of an upstream request head. `own` headers come from the gateway and win by being the only ones."""
    lines = [method.encode(), b" ", target, b" HTTP/1.1\r\nhost: ", host.encode(), b"\r\n"]
    for name, value in headers:
        if name in FORWARDED:
            lines += (name, b": ", value, b"\r\n")
    for name, value in own:
        lines += (name, b": ", value, b"\r\n")
    lines.append(b"content-length: %d\r\n\r\n" % body_length)
    return b"".join(lines)


def response_headers(upstream: Headers, own: Headers, *, is_stream: bool = False) -> Headers:
    """What the client gets: the replica's headers without hop-by-hop and internal ones, then the gateway's own.

    A stream loses its length: events may be taken out of it or added, so it goes out in chunks.
    """
    drop = NOT_RETURNED | {b"content-length"} if is_stream else NOT_RETURNED
    for name, value in upstream:
        if name == b"connection":
            drop = drop | {token.strip().lower() for token in value.split(b",")}
    kept = [(n, v) for n, v in upstream if n not in drop and not n.startswith(b"x-octavo-")]
    return kept + own
