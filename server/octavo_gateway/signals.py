"""What the gateway tells the autoscaler about each model: requests held, in flight, arriving, and their times."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewaySignals:
    """One model at one moment. Rates are per second, smoothed over a minute; held requests count as arrivals.

    `activation` is True while requests wait and no replica is ready: the model should be woken.
    """

    model: str
    held: int = 0
    in_flight: int = 0
    arrivals_total: int = 0
    completions_total: int = 0
    arrival_rate: float = 0.0
    completion_rate: float = 0.0
    mean_service_s: float = 0.0
    mean_ttfb_s: float = 0.0
    oldest_held_s: float = 0.0
    seconds_since_arrival: float = math.inf
    activation: bool = False


class DecayingRate:
    """Events per second with exponential forgetting over `window_s`. Time comes in as an argument."""

    __slots__ = ("_at", "_since", "_value", "_window_s")

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._value = 0.0
        self._at: float | None = None
        self._since = 0.0

    def add(self, now: float, count: float = 1.0) -> None:
        """Count events."""
        if self._at is None:
            self._since = now
        self._decay(now)
        self._value += count

    def rate(self, now: float) -> float:
        """Events per second; unbiased from the start, when less than a window has been seen."""
        if self._at is None:
            return 0.0
        self._decay(now)
        seen = self._window_s * -math.expm1(-max(now - self._since, 1.0) / self._window_s)
        return self._value / seen

    def _decay(self, now: float) -> None:
        if self._at is not None and now > self._at:
            self._value *= math.exp((self._at - now) / self._window_s)
        self._at = now if self._at is None else max(now, self._at)


class ModelSignals:
    """The running account behind `GatewaySignals`."""

    __slots__ = ("_arrivals", "_completions", "arrivals_total", "completions_total", "in_flight", "last_arrival_at",
                 "mean_service_s", "mean_ttfb_s")  # fmt: skip

    def __init__(self) -> None:
        self._arrivals = DecayingRate()
        self._completions = DecayingRate()
        self.in_flight = 0
        self.arrivals_total = 0
        self.completions_total = 0
        self.mean_service_s = 0.0
        self.mean_ttfb_s = 0.0
        self.last_arrival_at = -math.inf

    def arrived(self, now: float) -> None:
        """A request for this model came in."""
        self.arrivals_total += 1
        self.last_arrival_at = now
        self._arrivals.add(now)

    def first_byte(self, seconds: float) -> None:
        """A replica's first byte came `seconds` after the request had been sent to it."""
        self.mean_ttfb_s = _smooth(self.mean_ttfb_s, seconds)

    def completed(self, now: float, service_s: float) -> None:
        """A replica has answered in full, `service_s` after it got the request."""
        self.completions_total += 1
        self._completions.add(now)
        self.mean_service_s = _smooth(self.mean_service_s, service_s)

    def read(self, model: str, now: float, *, held: int, oldest_held_s: float, ready: int) -> GatewaySignals:
        """A snapshot for the autoscaler."""
        return GatewaySignals(
            model=model,
            held=held,
            in_flight=self.in_flight,
            arrivals_total=self.arrivals_total,
            completions_total=self.completions_total,
            arrival_rate=self._arrivals.rate(now),
            completion_rate=self._completions.rate(now),
            mean_service_s=self.mean_service_s,
            mean_ttfb_s=self.mean_ttfb_s,
            oldest_held_s=oldest_held_s,
            seconds_since_arrival=now - self.last_arrival_at,
            activation=held > 0 and ready == 0,
        )

    def completion_rate(self, now: float) -> float:
        return self._completions.rate(now)


def _smooth(mean: float, value: float, share: float = 0.1) -> float:
    return value if mean == 0.0 else mean + share * (value - mean)
