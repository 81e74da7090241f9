"""A quantity that is measured at some sizes and asked for at others."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from octavo_engine.scheduler.step_time import size_band

_SAMPLES = 7
_FEW = 3


class MeasuredCurve:
    """The usual value in each band of sizes (half an octave wide), and straight lines between them.

    A band's value is the median of its last seven measurements, which a pause of the machine does not move; of fewer
    than three it is the smallest, so that what looked bad once is looked at again.
    """

    def __init__(self) -> None:
        self._bands: dict[int, deque[tuple[float, int]]] = {}
        self._points: list[tuple[float, float]] | None = []

    def observe(self, size: int, value: float) -> None:
        band = 0 if size < 1 else 1 + size_band(size)
        self._bands.setdefault(band, deque(maxlen=_SAMPLES)).append((value, size))
        self._points = None

    def at(self, size: float, slope: float = 0.0) -> float | None:
        """The value at `size`, beyond the largest size known rising by `slope`; None before the first measurement."""
        points = self._known_points()
        if not points:
            return None
        for (left, low), (right, high) in pairwise(points):
            if left < size <= right:
                return low + (high - low) * (size - left) / (right - left)
        last, value = points[-1]
        return points[0][1] if size <= points[0][0] else value + slope * (size - last)

    def _known_points(self) -> list[tuple[float, float]]:
        if self._points is None:
            self._points = [_usual(self._bands[band]) for band in sorted(self._bands)]
        return self._points


def _usual(samples: deque[tuple[float, int]]) -> tuple[float, float]:
    value, size = sorted(samples)[len(samples) // 2 if len(samples) >= _FEW else 0]
    return size, value
