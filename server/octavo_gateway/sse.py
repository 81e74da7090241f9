"""Relays a server-sent-event stream in whole events, so that a replica's death never leaves half an event behind."""

from __future__ import annotations

MAX_EVENT_BYTES = 1024 * 1024
_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventRelay:
    """Cuts incoming bytes at event boundaries and remembers whether the stream said it was done."""

    __slots__ = ("_carry", "_tail")

    def __init__(self) -> None:
        self._carry = b""
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """All whole events so far; the rest waits for its end (unless one event grows beyond 1 MiB)."""
        if self._carry:
            data = self._carry + data
            self._carry = b""
        if not data.endswith(_ENDS) and len(data) <= MAX_EVENT_BYTES:
            cut = max(data.rfind(end) + len(end) if end in data else 0 for end in _ENDS)
            self._carry = data[cut:]
            data = data[:cut]
        if data:
            self._tail = data[-32:]
        return data

    def rest(self) -> bytes:
        """What follows the last event boundary when the stream ends properly."""
        rest, self._carry = self._carry, b""
        if rest:
            self._tail = rest[-32:]
        return rest

    @property
    def done(self) -> bool:
        """True when the last event was OpenAI's `data: [DONE]`."""
        return self._tail.rstrip().endswith(b"data: [DONE]")
