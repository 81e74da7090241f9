"""Search for launch configurations, ahead of serving: time candidates on representative workloads, keep the best.

The kernels themselves are asked which configuration they look up, so a workload needs no list of its own.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from octavo_kernels.triton import tuning
from octavo_kernels.triton.tuning import LaunchConfig, Table
from octavo_kernels.triton.workloads import Workload

_log = logging.getLogger(__name__)

GAIN = 1.02  # a candidate must be this much faster than the default to replace it

Measure = Callable[[Callable[[], object]], float]  # seconds of one call


@dataclass(frozen=True, slots=True)
class Finding:
    """What tuning one kernel on one workload found. Times in seconds; failed: candidates that could not run."""

    workload: str
    kernel: str
    key: str
    default_s: float
    best_s: float
    best: LaunchConfig
    tried: int
    failed: int

    @property
    def improved(self) -> bool:
        return self.default_s / self.best_s >= GAIN


def candidates(kernel: str, default: LaunchConfig) -> list[LaunchConfig]:
    """Configurations worth trying for a kernel, the default first. Rows of a tile (block_m) are given by the shape for
    the products; only prefill attention may change them. `splits` is no part of it: see `_tune_one`."""
    fields = _SPACES.get(_family(kernel), {})
    names = list(fields)
    found = [
        replace(default, **dict(zip(names, values, strict=True))) for values in itertools.product(*fields.values())
    ]
    return [default, *(config for config in found if config != default)]


def tune(
    workloads: Iterable[Workload], device: torch.device, measure: Measure, report: Callable[[Finding], None]
) -> Table:
    """Tune every kernel the workloads look up. Where workloads share a key, the last one decides."""
    table: Table = {}
    for workload in workloads:
        call = workload.prepare(device)
        with tuning.recording() as asked:
            call.run()
        for (kernel, key), default in asked.items():
            finding = _tune_one(workload.name, call.run, kernel, key, default, measure)
            report(finding)
            if finding.improved:
                table.setdefault(kernel, {})[key] = finding.best
        del call
    return table


def compile_candidates(workload: Workload, device: torch.device, shard: int, shards: int) -> int:
    """Run every shards-th candidate of a workload once, so that its machine code lies in Triton's cache on disk when it
    is timed; compiling takes far longer than timing and can be done by many processes. Returns how many ran."""
    call = workload.prepare(device)
    with tuning.recording() as asked:
        call.run()
    ran = 0
    for (kernel, key), default in asked.items():
        for config in candidates(kernel, default)[shard::shards]:
            with tuning.trial(kernel, key, config):
                ran += _time(call.run, _once, kernel, config) is not None
    return ran


def _once(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    return 0.0


def _tune_one(
    workload: str, run: Callable[[], object], kernel: str, key: str, default: LaunchConfig, measure: Measure
) -> Finding:
    """Try the tiles, then how many programs share a reduction with the best of them."""
    times: dict[LaunchConfig, float | None] = {}

    def best_of(tried: Iterable[LaunchConfig]) -> LaunchConfig:
        for config in tried:
            if config not in times:
                with tuning.trial(kernel, key, config):
                    times[config] = _time(run, measure, kernel, config)
        return min(times, key=lambda config: times[config] or math.inf)

    best = best_of(candidates(kernel, default))
    default_s = times[default]
    if default_s is None:
        raise RuntimeError(f"{workload}: the default configuration of {kernel} ({key}) does not run: {default}")
    best = best_of(replace(best, splits=splits) for splits in _SPLITS.get(_family(kernel), ()))
    failed = sum(seconds is None for seconds in times.values())
    return Finding(workload, kernel, key, default_s, times[best] or default_s, best, len(times), failed)


def _time(run: Callable[[], object], measure: Measure, kernel: str, config: LaunchConfig) -> float | None:
    """Seconds, or None for a configuration that needs more shared memory or registers than there are."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return measure(run)
    except (OutOfResources, PTXASError, CompilationError) as error:
        _log.debug("%s cannot run with %s: %s", kernel, config, error)
        return None


def _family(kernel: str) -> str:
    """`packed_gemm_m64` is tuned like every `packed_gemm`."""
    return next((name for name in _SPACES if kernel == name or kernel.startswith(f"{name}_m")), kernel)


_Space = dict[str, tuple[int, ...]]
_SPACES: dict[str, _Space] = {
    "paged_attention_decode": {"block_n": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 5)},
    "paged_attention_short": {"block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "paged_attention_prefill": {
        "block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4),
    },
    "mla_decode": {"block_m": (16, 64), "block_n": (16, 32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "packed_gemm": {
        "block_n": (32, 64, 128), "block_k": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 6),
    },
    "scaled_gemm": {"block_n": (32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "grouped_packed": {
        "block_n": (32, 64, 128), "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 5),
    },
    "silu_and_mul_quantize": {"block_n": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8, 16)},
    "grouped_gemm": {"block_n": (64, 128, 256), "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
}  # fmt: skip
_SPLITS: dict[str, tuple[int, ...]] = {"packed_gemm": (1, 2, 3, 4, 6, 8, 12, 16)}  # beside the kernel's own choice
