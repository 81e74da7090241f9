"""The harmony format of gpt-oss: every message names its channel, and calls name their recipient.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>

Source: OpenAI's description of the format, and the chat template that comes with the models. The tags are special
tokens, so the text must be decoded with them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from octavo_server.parsers.events import Content, Event, Reasoning, held_suffix, merged
from octavo_server.parsers.tool_calls import call_of

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
CALL_END = "<|call|>"
ENDS = ("<|end|>", CALL_END, "<|return|>")
ASSISTANT = f"{START}assistant"
ANSWER_OPENING = f"{CHANNEL}final{MESSAGE}"
CALL_OPENING, ARGUMENTS_OPENING = f"{CHANNEL}commentary to=functions.", f" {CONSTRAIN}json{MESSAGE}"
FUNCTIONS = "functions."
MAX_HEADER = 256

_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_OPENINGS = (START, CHANNEL, CONSTRAIN, MESSAGE, "to=")


class HarmonyParser:
    """Thoughts, answer and calls of one turn. `opened`: what the prompt already holds of the turn's first message.

    Analysis is thoughts; the final channel and remarks on the commentary channel are the answer. A message to a
    function is a call once it ends; a message to anything else stays as it was written.
    """

    def __init__(self, names: Collection[str], opened: str = "") -> None:
        self._names = names
        self._buffer = ""
        self._header: str | None = None  # of the message whose body is being read
        self._body = ""  # of a message to a recipient, which is told at its end
        self._begun = False  # whether this message has told anything
        self._told: type[Content | Reasoning] | None = None  # as what the last text was told
        self.push(opened, finished=False)

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thoughts."""
        return self._header is not None and self._kind() is Reasoning

    def push(self, text: str, finished: bool) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while self._read_header(finished) if self._header is None else self._read_body(events, finished):
            continue
        return merged(events)

    def _read_header(self, finished: bool) -> bool:
        """Read up to the message's body, or leave what is no header as a body; False when more text is needed."""
        text = ""
        while text != self._buffer:  # what stands between two messages, however it came in pieces
            text = self._buffer
            self._buffer = self._buffer.lstrip()
            for end in ENDS:
                self._buffer = self._buffer.removeprefix(end)
        if not text or (not finished and any(tag.startswith(text) for tag in (*_OPENINGS, *ENDS))):
            return False
        header, tag, body = text.partition(MESSAGE)
        longest = MAX_HEADER + (0 if tag else len(MESSAGE))
        if text.startswith(_OPENINGS) and "\n" not in header and len(header) <= longest:
            if not tag and not finished:
                return False
            header, body = (header, body) if tag else ("", text.removeprefix(START))
        else:
            header, body = "", text.removeprefix(START)
        self._header, self._buffer, self._begun = header, body, False
        return True

    def _read_body(self, events: list[Event], finished: bool) -> bool:
        """Read up to the message's end; False when more text is needed."""
        marks = (*ENDS, START)
        end = min((self._buffer.find(mark) for mark in marks if mark in self._buffer), default=-1)
        ended = end >= 0
        if not ended:
            end = len(self._buffer) - (0 if finished else max(held_suffix(self._buffer, mark) for mark in marks))
        self._tell(events, self._buffer[:end])
        self._buffer = self._buffer[end:]
        if ended or finished:
            self._close(events)
        return ended

    def _tell(self, events: list[Event], text: str) -> None:
        if self._recipient():
            self._body += text
        elif text:
            kind = self._kind()
            separator = "\n" if not self._begun and self._told is kind else ""
            self._told, self._begun = kind, True
            events.append(kind(separator + text))

    def _close(self, events: list[Event]) -> None:
        """The message is complete: tell the call that it may be."""
        recipient, kind, header, body = self._recipient(), self._kind(), self._header or "", self._body
        self._header, self._body = None, ""
        if recipient:
            is_function = recipient.startswith(FUNCTIONS)
            call = call_of(recipient.removeprefix(FUNCTIONS), body, self._names) if is_function else None
            events.append(call or kind(header + MESSAGE + body))

    def _recipient(self) -> str:
        found = _RECIPIENT.search(self._header or "")
        return found[1] if found else ""

    def _kind(self) -> type[Content | Reasoning]:
        found = _CHANNEL.search(self._header or "")
        return Reasoning if found and found[1] == "analysis" else Content


def opened_message(prompt: str) -> str:
    """What the end of a rendered prompt already holds of the assistant's message."""
    return prompt.rpartition(ASSISTANT)[2] if ASSISTANT in prompt else ""
