"""What the autoscaler sees at one moment. All numbers are counts, fractions or seconds; times are Unix seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """What one ready replica said last. None marks what its engine does not tell."""

    name: str
    sampled_at: float
    waiting: float = 0.0
    running: float = 0.0
    kv_utilization: float | None = None  # fraction of blocks in use by live requests; cached-but-free ones excluded
    kv_capacity_tokens: float | None = None
    queued_kv_tokens: float | None = None  # what the waiting requests will need


@dataclass(frozen=True, slots=True)
class Ttft:
    """Time to first token over one window."""

    window_end: float
    p95_s: float
    samples: int


@dataclass(frozen=True, slots=True)
class Signals:
    """One observation of a service.

    `current` is the number of replicas asked for now. `pending` counts replicas on their way: created, neither ready
    nor failed nor unschedulable. `held` counts requests that wait in the gateway, `arrivals` every request that ever
    reached it, held ones included; None without a gateway.
    """

    current: int
    ready: int
    samples: tuple[ReplicaSample, ...] = ()
    pending: int = 0
    unschedulable: int = 0
    held: int = 0
    arrivals: float | None = None
    service_s: float | None = None  # mean seconds a request runs, without queueing
    ttft: Ttft | None = None
    cold_start_s: float | None = None
    changing: bool = False  # a rollout or an adapter load is in progress

    def fresh(self, now: float, stale_after_s: float) -> tuple[ReplicaSample, ...]:
        """Samples that are recent enough to decide on."""
        return tuple(sample for sample in self.samples if now - sample.sampled_at <= stale_after_s)


def total(values: Iterable[float | None]) -> float:
    """Sum of the known values."""
    return sum(value for value in values if value is not None)
