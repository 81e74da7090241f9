"""Thoughts between `<think>` and `</think>`, as Qwen3, DeepSeek-R1, SmolLM3 and their kin write them."""

from __future__ import annotations

import enum

from octavo_server.parsers.events import Content, Event, Reasoning, held_suffix, merged

OPEN, CLOSE = "<think>", "</think>"


class _State(enum.Enum):
    BEFORE = enum.auto()
    THINKING = enum.auto()
    AFTER_THINKING = enum.auto()
    ANSWERING = enum.auto()


class ThinkParser:
    """Splits thoughts from the answer. `starts_thinking`: the prompt already ended with the opening tag.

    Line breaks next to the tags belong to neither part.
    """

    def __init__(self, *, starts_thinking: bool) -> None:
        self._state = _State.THINKING if starts_thinking else _State.BEFORE
        self._buffer = ""
        self._trims_start = starts_thinking

    @property
    def thinking(self) -> bool:
        return self._state is _State.THINKING

    def push(self, text: str, finished: bool) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while True:
            state = self._state
            if state is _State.BEFORE:
                self._before(finished)
            elif state is _State.THINKING:
                self._thinking(events, finished)
            elif state is _State.AFTER_THINKING:
                self._buffer = self._buffer.lstrip()
                if self._buffer:
                    self._state = _State.ANSWERING
            else:
                events.append(Content(self._buffer))
                self._buffer = ""
            if self._state is state:
                return merged(events)

    def _before(self, finished: bool) -> None:
        """Wait until the text can or cannot begin with the opening tag."""
        stripped = self._buffer.lstrip()
        if stripped.startswith(OPEN):
            self._buffer = stripped[len(OPEN) :]
            self._state, self._trims_start = _State.THINKING, True
        elif finished or not OPEN.startswith(stripped):
            self._state = _State.ANSWERING

    def _thinking(self, events: list[Event], finished: bool) -> None:
        if self._trims_start:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return
            self._trims_start = False
        thoughts, tag, rest = self._buffer.partition(CLOSE)
        if tag:
            events.append(Reasoning(thoughts.rstrip()))
            self._buffer = rest
            self._state = _State.AFTER_THINKING
            return
        if finished:
            events.append(Reasoning(thoughts.rstrip()))
            self._buffer = ""
            return
        certain = len(thoughts) - held_suffix(thoughts, CLOSE)
        certain = len(thoughts[:certain].rstrip())
        events.append(Reasoning(thoughts[:certain]))
        self._buffer = thoughts[certain:]
