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


class ObjectScan:
    """Looks for one object at the beginning of a growing text, reading each character once."""

    def __init__(self) -> None:
        self.start = 0
        self.failed = False
        self._position = 0
        self._scanner: JsonObjectScanner | None = None

    def end_in(self, text: str) -> int | None:
        """Position behind the object; None while incomplete or when the text begins otherwise (`failed`)."""
        if self._scanner is None:
            start = len(text) - len(text.lstrip())
            if start == len(text):
                return None
            if text[start] != "{":
                self.failed = True
                return None
            self.start = self._position = start
            self._scanner = JsonObjectScanner()
        while self._position < len(text):
            self._position += 1
            if self._scanner.feed(text[self._position - 1]):
                return self._position
        return None
