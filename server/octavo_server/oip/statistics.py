"""Counts and durations of v2 inferences, as Triton's statistics extension reports them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


@dataclass
class ModelStatistics:
    """Of one model since the process began."""

    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)

    def succeeded(self, ns: int) -> None:
        self.success.add(ns)
        self.last_inference_ms = int(time.time() * 1_000)

    def failed(self, ns: int) -> None:
        self.fail.add(ns)

    def durations(self) -> dict[str, Duration]:
        """By the protocol's names. The engine batches continuously, so an inference's time is its computation."""
        idle = Duration()
        return {
            "success": self.success,
            "fail": self.fail,
            "queue": idle,
            "compute_input": idle,
            "compute_infer": self.success,
            "compute_output": idle,
            "cache_hit": idle,
            "cache_miss": idle,
        }
