"""Find where a JSON object ends while its text is still arriving."""

from __future__ import annotations


class JsonObjectScanner:
    """Feed characters from the opening brace on; strings and escapes are respected."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, char: str) -> bool:
        """Whether `char` closes the object."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def object_end(text: str) -> int | None:
    """Position behind the object that begins at `text[0]`; None while it is incomplete."""
    scanner = JsonObjectScanner()
    for position, char in enumerate(text):
        if scanner.feed(char):
            return position + 1
    return None
