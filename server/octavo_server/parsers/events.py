"""What a parser finds in a model's text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the thoughts before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """One complete tool call; `arguments` is a JSON object's text."""

    name: str
    arguments: str


Event = Content | Reasoning | Call


class TextParser(Protocol):
    """Takes text as it comes. `finished` releases what was held back; nothing is pushed after it."""

    def push(self, text: str, finished: bool) -> list[Event]: ...


def stepped(step: Callable[[list[Event], bool], bool], finished: bool) -> list[Event]:
    """Events of a parser's steps, taken until one returns False for want of text."""
    events: list[Event] = []
    while step(events, finished):
        continue
    return merged(events)


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring texts of one kind become one, empty ones go."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Call) or event.text:
            result.append(event)
    return result


def held_suffix(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without completing it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
