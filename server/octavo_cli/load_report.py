"""Pure summary of a load test: percentiles, throughput and goodput, in the fields of `vllm bench serve`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GOODPUT_METRICS = ("ttft", "tpot", "e2el")
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True)
class Sample:
    """One request. Times are seconds, `started_s` since the load began; `itl_s`: gaps between its events."""

    ok: bool
    started_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: Sequence[float] = field(default_factory=tuple)
    cached_tokens: int = 0
    error: str = ""
    status: int = 0

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for answers of one token."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


def percentile(values: Sequence[float], rank: float) -> float:
    """Linear interpolation between the closest ranks (numpy's default); 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = (len(ordered) - 1) * rank / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(
    samples: Sequence[Sample],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (50, 90, 99),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The report. `goodput` maps ttft, tpot or e2el to the most milliseconds a good request takes."""
    done = [sample for sample in samples if sample.ok]
    duration_s = max(duration_s, 1e-9)
    inputs, outputs = sum(s.input_tokens for s in done), sum(s.output_tokens for s in done)
    report: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "rejected": sum(sample.status in (429, 503) for sample in samples if not sample.ok),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_cached_tokens": sum(s.cached_tokens for s in done),
        "request_throughput": len(done) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_output_tokens_per_s": most_tokens_in_a_second(done),
        "max_concurrent_requests": most_at_a_time(done),
    }
    if goodput:
        good = sum(is_good(sample, goodput) for sample in done)
        report["request_goodput"] = good / duration_s
        report["good_request_fraction"] = good / len(samples) if samples else 0.0
    for name, values in _metric_values(done).items():
        report[f"mean_{name}_ms"] = statistics.fmean(values) if values else 0.0
        report[f"median_{name}_ms"] = percentile(values, 50)
        report[f"std_{name}_ms"] = statistics.pstdev(values) if values else 0.0
        for rank in percentiles:
            report[f"p{rank:g}_{name}_ms"] = percentile(values, rank)
    return report


def most_at_a_time(samples: Sequence[Sample]) -> int:
    """How many requests were under way together."""
    starts, ends = ((s.started_s, 1) for s in samples), ((s.started_s + s.e2e_s, -1) for s in samples)
    changes = sorted((*starts, *ends))  # of one moment, ends come first
    return max(itertools.accumulate(step for _, step in changes), default=0)


def most_tokens_in_a_second(samples: Sequence[Sample]) -> float:
    """Output tokens of the best whole second since the load began; an event brings its part of the answer's tokens."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for sample in samples:
        part = sample.output_tokens / (1 + len(sample.itl_s))
        for at_s in itertools.accumulate(sample.itl_s, initial=sample.started_s + sample.ttft_s):
            seconds[int(at_s)] += part
    return max(seconds.values(), default=0.0)


def is_good(sample: Sample, goodput: Mapping[str, float]) -> bool:
    """Whether a request kept every limit."""
    took = {"ttft": sample.ttft_s, "tpot": sample.tpot_s or 0.0, "e2el": sample.e2e_s}
    return all(took[name] * 1_000 <= limit_ms for name, limit_ms in goodput.items())


def _metric_values(done: Sequence[Sample]) -> dict[str, list[float]]:
    """Milliseconds of each metric."""
    return {
        "ttft": [s.ttft_s * 1_000 for s in done],
        "tpot": [s.tpot_s * 1_000 for s in done if s.tpot_s is not None],
        "itl": [gap * 1_000 for s in done for gap in s.itl_s],
        "e2el": [s.e2e_s * 1_000 for s in done],
    }
