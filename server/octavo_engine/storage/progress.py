"""Progress of a download, told as a fraction with a line of text."""

from __future__ import annotations

import threading
from collections.abc import Callable

OnProgress = Callable[[float, str], None]
"""Called with a fraction in [0, 1] and what is being done; possibly from several threads, never concurrently."""


def ignore_progress(_fraction: float, _detail: str) -> None:
    """For callers that do not watch."""


class ByteProgress:
    """Adds up the bytes of files that arrive in parallel; reports at most once per half percent."""

    def __init__(self, total: int, detail: str, on_progress: OnProgress) -> None:
        self._total = total
        self._detail = detail
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = 0
        self._reported = -1.0

    def add(self, num_bytes: int) -> None:
        """Count bytes that arrived; negative when a file starts over."""
        with self._lock:
            self._done += num_bytes
            if self._total <= 0:
                return
            fraction = min(max(self._done / self._total, 0.0), 1.0)
            if abs(fraction - self._reported) >= 0.005 or fraction == 1.0 != self._reported:
                self._reported = fraction
                self._on_progress(
                    fraction, f"{self._detail} ({format_bytes(self._done)} of {format_bytes(self._total)})"
                )


def format_bytes(num_bytes: float) -> str:
    """`1.5 GiB`, `94 MiB`, `12 B`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
