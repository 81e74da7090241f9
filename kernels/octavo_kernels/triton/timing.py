"""Timing calls on a CUDA device, and what the device could do at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # larger than any L2 cache
COPY_BYTES = 2 << 30
MATRIX_SIZE = 8_192


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, and the spread between the 20th and 80th percentile."""

    median_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured in this process: bytes per second of a large copy (read plus written), and operations per second of
    large dense products."""

    copy_bytes_s: float
    bf16_flops_s: float

    def least_seconds(self, moved: int, flops: int) -> float:
        """No call that moves and computes this much can be faster."""
        return max(moved / self.copy_bytes_s, flops / self.bf16_flops_s)


def time_call(call: Callable[[], object], repeats: int = 30, graph: bool = True) -> Timing:
    """Time a call with a cold L2 cache. As a CUDA graph, so that the host's time between launches is left out."""
    call()
    torch.cuda.synchronize()
    replay = _captured(call) if graph else call
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5])


def measure_limits() -> Limits:
    """Copy 2 GiB and multiply 8192 by 8192 matrices. The copy is not captured: a graph gives it to a copy engine,
    which is slower than the multiprocessors."""
    source, target = (torch.empty(COPY_BYTES // 4, dtype=torch.float32, device="cuda").normal_() for _ in range(2))
    a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = min(time_call(run, graph=False).low_s for run in (lambda: target.copy_(source), lambda: target.add_(0.0)))
    product = time_call(lambda: torch.mm(a, b)).low_s
    return Limits(2 * COPY_BYTES / copy, 2 * MATRIX_SIZE**3 / product)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
