"""What the autoscaler remembers between decisions: estimates, recent recommendations, recent changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.signals import ReplicaSample, Signals, Ttft, total

KBAR_WEIGHT = 0.3
KBAR_MIN, KBAR_MAX = 1e-4, 0.5
ARRIVAL_HALF_LIFE_S = 60.0
SERVICE_WEIGHT = 0.2
TREND_WINDOW_S = 300.0
TREND_STEP_S = 30.0


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How many replicas the signals asked for at a time."""

    time: float
    replicas: int


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the number of replicas; `delta` is signed."""

    time: float
    delta: int


@dataclass(frozen=True, slots=True)
class History:
    """Immutable; `decide` returns the next one. `started_at` is when this memory began (the operator's start)."""

    started_at: float
    kbar: float | None = None  # KV fraction that one running request uses
    service_s: float | None = None
    capacity_tokens: float | None = None
    arrival_rate: float | None = None  # requests per second, exponentially weighted
    arrivals: float | None = None
    arrivals_at: float | None = None
    arrived: bool = False  # a request came since the last decision
    last_active: float | None = None
    queue_breaches: int = 0
    slow_windows: int = 0
    ttft_window_end: float = 0.0
    recommendations: tuple[Recommendation, ...] = ()
    changes: tuple[Change, ...] = ()
    trend: tuple[tuple[float, float], ...] = ()  # (time, arrival rate)

    def learn(self, signals: Signals, fresh: tuple[ReplicaSample, ...], policy: ScalingPolicy, now: float) -> History:
        """The history with its estimates brought up to date."""
        learned = self._learn_work(signals, fresh)._learn_arrivals(signals, now)
        backlog = total(s.waiting for s in fresh) + signals.held
        busy = backlog + total(s.running for s in fresh) > 0
        arrived = learned.arrivals is not None and self.arrivals is not None and learned.arrivals > self.arrivals
        active = busy or arrived or self.last_active is None
        breached = policy.queue_target is not None and backlog > policy.queue_target * signals.ready
        return replace(
            learned,
            arrived=arrived,
            last_active=now if active else self.last_active,
            queue_breaches=self.queue_breaches + 1 if breached else 0,
        )._learn_latency(signals.ttft, policy)

    def _learn_work(self, signals: Signals, fresh: tuple[ReplicaSample, ...]) -> History:
        running = total(s.running for s in fresh)
        used = total(s.kv_utilization for s in fresh)
        kbar = self.kbar
        if running > 0 and used > 0:
            sample = min(max(used / running, KBAR_MIN), KBAR_MAX)
            kbar = sample if kbar is None else kbar + KBAR_WEIGHT * (sample - kbar)
        service_s = self.service_s
        if signals.service_s is not None and signals.service_s > 0:
            old = signals.service_s if service_s is None else service_s
            service_s = old + SERVICE_WEIGHT * (signals.service_s - old)
        capacities = sorted(s.kv_capacity_tokens for s in fresh if s.kv_capacity_tokens)
        capacity = capacities[len(capacities) // 2] if capacities else self.capacity_tokens
        return replace(self, kbar=kbar, service_s=service_s, capacity_tokens=capacity)

    def _learn_arrivals(self, signals: Signals, now: float) -> History:
        if signals.arrivals is None:
            return self
        if self.arrivals is None or self.arrivals_at is None or signals.arrivals < self.arrivals:
            return replace(self, arrivals=signals.arrivals, arrivals_at=now)  # first sight, or a gateway restarted
        elapsed = now - self.arrivals_at
        if elapsed <= 0:
            return self
        rate = (signals.arrivals - self.arrivals) / elapsed
        weight = 1 - math.exp2(-elapsed / ARRIVAL_HALF_LIFE_S)
        smooth = rate if self.arrival_rate is None else self.arrival_rate + weight * (rate - self.arrival_rate)
        trend = self.trend
        if not trend or now - trend[-1][0] >= TREND_STEP_S:
            trend = (*(point for point in trend if now - point[0] <= TREND_WINDOW_S), (now, smooth))
        return replace(self, arrivals=signals.arrivals, arrivals_at=now, arrival_rate=smooth, trend=trend)

    def _learn_latency(self, ttft: Ttft | None, policy: ScalingPolicy) -> History:
        if ttft is None or policy.ttft_target_s is None or ttft.window_end <= self.ttft_window_end:
            return self
        slow = ttft.samples >= MIN_TTFT_SAMPLES and ttft.p95_s > policy.ttft_target_s
        return replace(self, slow_windows=self.slow_windows + 1 if slow else 0, ttft_window_end=ttft.window_end)

    def rate_slope(self) -> float:
        """Change of the arrival rate per second over the last minutes; 0 while too little is known."""
        if len(self.trend) < 3:
            return 0.0
        (t0, r0), (t1, r1) = self.trend[0], self.trend[-1]
        return (r1 - r0) / (t1 - t0) if t1 > t0 else 0.0

    def persisted(self) -> dict[str, str]:
        """The estimates that are worth keeping in a status, as strings."""
        values = {"kbar": self.kbar, "serviceSeconds": self.service_s, "kvCapacityTokens": self.capacity_tokens}
        return {name: f"{value:.6g}" for name, value in values.items() if value is not None}

    @classmethod
    def restore(cls, learned: Mapping[str, str], now: float) -> History:
        """A fresh memory with persisted estimates; values that are no positive numbers are ignored."""

        def number(name: str) -> float | None:
            try:
                value = float(learned[name])
            except (KeyError, ValueError):
                return None
            return value if math.isfinite(value) and value > 0 else None

        kbar = number("kbar")
        return cls(
            started_at=now,
            kbar=None if kbar is None else min(max(kbar, KBAR_MIN), KBAR_MAX),
            service_s=number("serviceSeconds"),
            capacity_tokens=number("kvCapacityTokens"),
        )


MIN_TTFT_SAMPLES = 50
