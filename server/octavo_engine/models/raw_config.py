"""Typed, bounded reading of a checkpoint's config.json (or of GGUF metadata in the same terms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo_engine.errors import ModelLoadError

MAX_SIZE = 1 << 24  # no width, count or length of a real model comes near
MAX_NUMBER = 1e12


class RawConfig:
    """Values by Hugging Face's names; every getter says which field is missing or wrong, and where.

    A key that is absent or null takes the default; without a default it is an error.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values = values
        self.origin = origin

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = -MAX_NUMBER, high: float = MAX_NUMBER
    ) -> float:
        value = self._get(key, default)
        if not _is_number(value) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def numbers(
        self, key: str, default: tuple[float, ...] | None = None, *, low: float = -MAX_NUMBER, high: float = MAX_NUMBER
    ) -> tuple[float, ...]:
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(_is_number(v) and low <= v <= high for v in value):
            raise self.wrong(key, f"a list of numbers from {low:g} to {high:g}")
        return tuple(float(v) for v in value)

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids; none when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_SIZE for i in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def section(self, key: str) -> RawConfig | None:
        """A nested object, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return RawConfig(value, f"{self.origin}: {key}")

    def wrong(self, key: str, expected: str) -> ModelLoadError:
        return ModelLoadError(f"{self.origin}: {key} must be {expected}, got {self.values.get(key)!r:.80}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelLoadError(f"{self.origin}: {key} is missing")
        return default


def _is_number(value: Any) -> bool:
    """A JSON number; comparisons with finite bounds then rule out NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool)
