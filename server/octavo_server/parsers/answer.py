"""Reasoning and tool calls of one answer, as one parser."""

from __future__ import annotations

from typing import Protocol

from octavo_server.parsers.events import Call, Content, Event, TextParser, merged


class ThoughtParser(TextParser, Protocol):
    """Tells thoughts from the rest. `thinking`: whether what comes next is thoughts."""

    @property
    def thinking(self) -> bool: ...


class AnswerParser:
    """Splits thoughts off first and looks for tool calls in the rest. Without either it passes text through.

    Formats in which both are one, like harmony, are read by `reasoning` alone.
    """

    def __init__(
        self, reasoning: ThoughtParser | None = None, tools: TextParser | None = None, *, max_calls: int | None = None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._max_calls = max_calls
        self.num_calls = 0

    @property
    def thinking(self) -> bool:
        return self._reasoning is not None and self._reasoning.thinking

    def push(self, text: str, finished: bool) -> list[Event]:
        """What is certain after more text; `finished` releases what was held back."""
        if self._reasoning is None and self._tools is None:
            return [Content(text)] if text else []
        events: list[Event] = [Content(text)] if self._reasoning is None else self._reasoning.push(text, finished)
        if self._tools is not None:
            answer = "".join(event.text for event in events if isinstance(event, Content))
            events = [event for event in events if not isinstance(event, Content)]
            events += self._tools.push(answer, finished)
        return merged([event for event in events if self._allowed(event)])

    def _allowed(self, event: Event) -> bool:
        if not isinstance(event, Call):
            return True
        if self._max_calls is not None and self.num_calls >= self._max_calls:
            return False
        self.num_calls += 1
        return True
