"""Tool calls of Gemma 3, which has no tokens for them: what the prompt asks for is what comes back as text.

Google's guide lets a prompt ask for one of two forms: a JSON object with `name` and `parameters`, or calls as Python
writes them, `[name(argument=value), ...]`. Models put either into a fence of their own (`tool_code`,
`tool_call`, `json`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection

from octavo_server.parsers.events import Call, Content, Event, TextParser, held_suffix, stepped
from octavo_server.parsers.json_list import JsonListParser
from octavo_server.parsers.tool_calls import Llama3JsonParser, call_in, call_of

FENCE = "```"
LANGUAGES = ("tool_code", "tool_call", "json")
MAX_PYTHON_CHARS = 20_000  # deeper nesting than any call has is not parsed

_OPENING = re.compile(FENCE + r"(?:" + "|".join(LANGUAGES) + r")[ \t]*\n")


class GemmaParser:
    """Calls as the whole answer, or in fences with text around them; what is no call stays text."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""
        self._whole: TextParser | None = None  # reads an answer that begins as a call does
        self._started = False
        self._fence = ""  # the opening of the one that is being read

    def push(self, text: str, finished: bool) -> list[Event]:
        if self._whole is not None:
            return self._whole.push(text, finished)
        self._buffer += text
        return stepped(self._step, finished)

    def _step(self, events: list[Event], finished: bool) -> bool:
        """One transition; False when more text is needed."""
        if not self._started:
            return self._start(events, finished)
        if self._fence:
            return self._in_fence(events, finished)
        found = _OPENING.search(self._buffer)
        if found:
            events.append(Content(self._buffer[: found.start()]))
            self._fence, self._buffer = found[0], self._buffer[found.end() :]
            return True
        certain = len(self._buffer) - (0 if finished else _held_opening(self._buffer))
        events.append(Content(self._buffer[:certain]))
        self._buffer = self._buffer[certain:]
        return False

    def _start(self, events: list[Event], finished: bool) -> bool:
        """Choose how to read the answer by its first characters."""
        stripped = self._buffer.lstrip()
        if not finished and (not stripped or (stripped[0] == "[" and not stripped[1:].lstrip())):
            return False
        self._started = True
        if stripped.startswith("{"):
            self._whole = Llama3JsonParser(self._names)
        elif stripped.startswith("["):
            is_json = stripped[1:].lstrip().startswith("{")
            self._whole = JsonListParser(self._names) if is_json else _PythonListParser(self._names)
        if self._whole is None:
            return True
        events += self._whole.push(self._buffer, finished)
        self._buffer = ""
        return False

    def _in_fence(self, events: list[Event], finished: bool) -> bool:
        """Read to the fence's end, or to the answer's, where models leave it out."""
        body, closing, rest = self._buffer.partition(FENCE)
        if not closing and not finished:
            return False
        opening, self._fence = self._fence, ""
        calls = read_calls(body, self._names)
        self._buffer = rest.lstrip() if calls else rest
        events += calls or [Content(opening + body + closing)]
        return bool(closing)


class _PythonListParser:
    """The whole answer is `[name(argument=value), ...]`, or text; known only at its end."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""

    def push(self, text: str, finished: bool) -> list[Event]:
        self._buffer += text
        if not finished:
            return []
        calls = read_calls(self._buffer, self._names)
        return [*calls] if calls else [Content(self._buffer)]


def read_calls(text: str, names: Collection[str]) -> list[Call]:
    """The calls that a text holds, in JSON or as Python; empty when anything in it is no call of a tool."""
    calls = _from_json(text, names) if text.lstrip().startswith(("{", "[{")) else _from_python(text, names)
    return [call for call in calls if call is not None] if None not in calls else []


def _from_json(text: str, names: Collection[str]) -> list[Call | None]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    items = value if isinstance(value, list) else [value]
    return [call_in(item, "parameters", names) for item in items]


def _from_python(text: str, names: Collection[str]) -> list[Call | None]:
    """Calls with named literals as arguments, alone, one a line, in a list, or printed."""
    if len(text) > MAX_PYTHON_CHARS:
        return []
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls: list[Call | None] = []
    for statement in statements:
        value = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
        items = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
        calls += [_python_call(item, names) for item in items]
    return calls


def _python_call(node: ast.expr | None, names: Collection[str]) -> Call | None:
    if _called_name(node) == "print" and "print" not in names and isinstance(node, ast.Call) and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        return None
    try:
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        return call_of(_called_name(node), json.dumps(arguments, allow_nan=False), names)
    except (ValueError, TypeError, RecursionError):
        return None


def _called_name(node: ast.expr | None) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _held_opening(text: str) -> int:
    """Length of the end of `text` that may still become a fence's opening."""
    word = text.rstrip(" \t")
    trailing = len(text) - len(word)
    if any(word.endswith(FENCE + language) for language in LANGUAGES):
        return trailing + max(len(FENCE + language) for language in LANGUAGES if word.endswith(FENCE + language))
    return max(held_suffix(text, FENCE + language) for language in LANGUAGES)
