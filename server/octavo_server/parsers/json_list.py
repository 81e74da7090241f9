"""Tool calls as one JSON list, `[{"name": ..., "arguments": {...}}, ...]`: Mistral, Mixtral and Phi-4-mini.

Their tags are special tokens and therefore mostly not in the text.
"""

from __future__ import annotations

import enum
from collections.abc import Collection

from octavo_server.parsers.events import Content, Event, stepped
from octavo_server.parsers.json_objects import ObjectScan
from octavo_server.parsers.tool_calls import read_call

MISTRAL_OPEN, PHI_OPEN = "[TOOL_CALLS]", "<|tool_call|>"
OPENINGS, CLOSE = (MISTRAL_OPEN, PHI_OPEN), "<|/tool_call|>"


class _State(enum.Enum):
    BEFORE = enum.auto()
    IN_ITEM = enum.auto()
    AFTER_ITEM = enum.auto()
    AFTER_LIST = enum.auto()
    TEXT = enum.auto()


class JsonListParser:
    """The whole answer is the list. An answer that begins otherwise is text, and so is what follows the list."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._state = _State.BEFORE
        self._buffer = ""
        self._item_start = 0
        self._scan = ObjectScan()

    def push(self, text: str, finished: bool) -> list[Event]:
        self._buffer += text
        return stepped(self._step, finished)

    def _step(self, events: list[Event], finished: bool) -> bool:
        """One transition; False when more text is needed."""
        match self._state:
            case _State.BEFORE:
                return self._before(finished)
            case _State.IN_ITEM:
                return self._in_item(events, finished)
            case _State.AFTER_ITEM:
                return self._after_item(finished)
            case _State.AFTER_LIST:
                return self._after_list(finished)
        events.append(Content(self._buffer))
        self._buffer = ""
        return False

    def _before(self, finished: bool) -> bool:
        stripped = self._buffer.lstrip()
        tag = next((opening for opening in OPENINGS if stripped.startswith(opening)), "")
        rest = stripped[len(tag) :].lstrip()
        may_become_tag = not tag and any(opening.startswith(stripped) for opening in OPENINGS)
        if not finished and (may_become_tag or not rest):
            return False
        if rest.startswith("["):
            self._begin_item(len(self._buffer) - len(rest) + 1)
        else:
            self._state = _State.TEXT
        return True

    def _begin_item(self, start: int) -> None:
        self._state, self._item_start, self._scan = _State.IN_ITEM, start, ObjectScan()

    def _in_item(self, events: list[Event], finished: bool) -> bool:
        text = self._buffer[self._item_start :]
        end = self._scan.end_in(text)
        if end is None and not finished and not self._scan.failed:
            return False
        call = None if end is None else read_call(text[self._scan.start : end], "arguments", self._names)
        if call is None:
            self._state = _State.TEXT
        else:
            events.append(call)
            self._buffer = text[end:]
            self._state = _State.AFTER_ITEM
        return True

    def _after_item(self, finished: bool) -> bool:
        stripped = self._buffer.lstrip()
        if not stripped:
            self._buffer = "" if finished else self._buffer
            return False
        self._buffer = stripped
        if stripped[0] == ",":
            self._begin_item(1)
        elif stripped[0] == "]":
            self._buffer, self._state = stripped[1:], _State.AFTER_LIST
        else:
            self._state = _State.TEXT
        return True

    def _after_list(self, finished: bool) -> bool:
        stripped = self._buffer.lstrip()
        if stripped.startswith(CLOSE):
            self._buffer = stripped[len(CLOSE) :]
            return True
        if CLOSE.startswith(stripped):
            self._buffer = "" if finished else self._buffer
            return False
        self._buffer, self._state = stripped, _State.TEXT
        return True
