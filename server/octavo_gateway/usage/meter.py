"""Reads the engine's own token counts out of an answer that passes by, and asks for them where the client did not."""

from __future__ import annotations

import re

import msgspec

MAX_KEPT_BYTES = 4 * 1024 * 1024
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_CHUNKS_WITHOUT_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """OpenAI's names, and those of its Responses and Anthropic's Messages API."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Document(msgspec.Struct):
    usage: _Usage | None = None


_DOCUMENT = msgspec.json.Decoder(_Document)


class UsageMeter:
    """Counts of one request. `known` is False until the engine has told them; `events` counts streamed ones."""

    __slots__ = ("_kept", "_kept_bytes", "_strip", "cached_tokens", "events", "known", "output_tokens", "prompt_tokens")

    def __init__(self, *, strip: bool = False) -> None:
        self._strip = strip
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self.known = False
        self.events = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0

    def feed_events(self, events: bytes) -> bytes:
        """Whole events on their way to the client; the usage event is taken out if the client did not ask for it."""
        self.events += events.count(b"data: ")
        if _USAGE.search(events) is None:
            return events
        kept = []
        for event in events.split(b"\n\n"):
            if _USAGE.search(event) is not None:
                self._read(event.partition(b"data: ")[2])
                if self._strip and _CHUNKS_WITHOUT_CHOICES.search(event) is not None:
                    continue
            kept.append(event)
        return b"\n\n".join(kept)

    def feed_body(self, data: bytes) -> None:
        """Bytes of a whole JSON answer on their way to the client."""
        self._kept_bytes += len(data)
        if self._kept_bytes <= MAX_KEPT_BYTES:
            self._kept.append(data)

    def finish_body(self) -> None:
        """The JSON answer is complete."""
        if 0 < self._kept_bytes <= MAX_KEPT_BYTES:
            self._read(b"".join(self._kept))
        self._kept.clear()

    def _read(self, document: bytes) -> None:
        try:
            usage = _DOCUMENT.decode(document).usage
        except msgspec.DecodeError:
            return
        if usage is None:
            return
        prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
        output = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
        if prompt is None and output is None:
            return
        details = usage.prompt_tokens_details or usage.input_tokens_details
        self.known = True
        self.prompt_tokens = max(0, prompt or 0)
        self.output_tokens = max(0, output or 0)
        self.cached_tokens = min(self.prompt_tokens, max(0, (details.cached_tokens or 0) if details else 0))


def ask_for_usage(body: bytes) -> tuple[bytes, bool]:
    """A streaming request's body that asks for the usage event, and whether that event must be hidden again.

    All other values stay byte for byte as they are. The body has been checked to be a JSON object.
    """
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    options = fields.get("stream_options")
    try:
        known = msgspec.json.decode(options, type=dict[str, msgspec.Raw] | None) if options is not None else None
    except msgspec.ValidationError:
        return body, False  # the replica will say what is wrong with it
    if known is not None and bytes(known.get("include_usage", b"")) == b"true":
        return body, False
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode((known or {}) | {"include_usage": True}))
    return msgspec.json.encode(fields), True
