"""Tool calls in the formats of the model families.

A call is told once it is complete, so that its arguments always are one JSON object. What looks like a call and is none
stays text: nothing a model wrote is lost.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from octavo_server.parsers.events import Call, Content, Event, held_suffix, merged, stepped
from octavo_server.parsers.json_objects import ObjectScan

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, SmolLM3."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""
        self._scan: ObjectScan | None = None
        self._after_call = False

    def push(self, text: str, finished: bool) -> list[Event]:
        self._buffer += text
        return stepped(self._step, finished)

    def _step(self, events: list[Event], finished: bool) -> bool:
        """One transition; False when more text is needed."""
        if self._scan is not None:
            return self._inside(events, finished)
        if self._after_call:
            return self._skip_close(finished)
        before, tag, rest = self._buffer.partition(OPEN)
        if tag:
            events.append(Content(before))
            self._buffer, self._scan = rest, ObjectScan()
            return True
        certain = len(before) if finished else len(before) - held_suffix(before, OPEN)
        events.append(Content(before[:certain]))
        self._buffer = before[certain:]
        return False

    def _inside(self, events: list[Event], finished: bool) -> bool:
        assert self._scan is not None  # noqa: S101  (only called then)
        end = self._scan.end_in(self._buffer)
        if end is None and not finished and not self._scan.failed:
            return False
        scan, self._scan = self._scan, None
        call = None if end is None else read_call(self._buffer[scan.start : end], "arguments", self._names)
        if call is None:
            events.append(Content(OPEN))  # no call after all: the tag is text, and so may be what follows
            self._after_call = False
            return True
        events.append(call)
        self._buffer = self._buffer[end:]
        self._after_call = True
        return True

    def _skip_close(self, finished: bool) -> bool:
        """Drop the closing tag and the white space around it."""
        stripped = self._buffer.lstrip()
        if stripped.startswith(CLOSE):
            self._buffer = stripped[len(CLOSE) :]
            return True
        if not stripped or CLOSE.startswith(stripped):
            if finished:
                self._buffer, self._after_call = "", False
            return finished
        self._buffer = stripped
        self._after_call = False
        return True


class Llama3JsonParser:
    """The whole answer is `{"name": ..., "parameters": {...}}`, several separated by `;`: Llama 3.1 to 3.3."""

    _PREFIX = "<|python_tag|>"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""
        self._is_text = False
        self._scan = ObjectScan()
        self._called = False

    def push(self, text: str, finished: bool) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while not self._is_text and self._step(events, finished):
            continue
        if self._is_text:
            events.append(Content(self._buffer))
            self._buffer = ""
        return merged(events)

    def _step(self, events: list[Event], finished: bool) -> bool:
        stripped = self._buffer.lstrip("; \n\t") if self._called else self._buffer.lstrip()
        if not self._called and (stripped.startswith(self._PREFIX) or self._PREFIX.startswith(stripped)):
            if len(stripped) < len(self._PREFIX):
                self._is_text = finished
                return False
            stripped = stripped[len(self._PREFIX) :].lstrip()
        if not stripped:
            if finished:
                self._buffer = ""
            return False
        end = self._scan.end_in(stripped)
        if end is None and not finished and not self._scan.failed:
            return False
        call = None if end is None else read_call(stripped[self._scan.start : end], "parameters", self._names)
        if call is None:
            self._is_text = True
            return False
        events.append(call)
        self._buffer, self._scan, self._called = stripped[end:], ObjectScan(), True
        return True


def read_call(text: str, arguments_key: str, names: Collection[str]) -> Call | None:
    """The call that an object's JSON text describes, or None when it describes none of the tools."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return call_in(value, arguments_key, names)


def call_in(value: object, arguments_key: str, names: Collection[str]) -> Call | None:
    """The call an object describes, or None when it describes none of the tools."""
    if not isinstance(value, dict):
        return None
    arguments = value.get(arguments_key, value.get("arguments", value.get("parameters", {})))
    return call_of(value.get("name"), arguments, names)


def call_of(name: object, arguments: object, names: Collection[str]) -> Call | None:
    """The call of a tool with arguments as an object or its JSON text; None when it is none of the tools."""
    if not isinstance(name, str) or name not in names:
        return None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict | None):
        return None
    return Call(name, json.dumps(arguments or {}, ensure_ascii=False))
