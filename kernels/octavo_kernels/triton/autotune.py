"""Search for launch configurations, ahead of serving: time candidates on representative workloads, keep the best.

The kernels themselves are asked which configuration they look up, so a workload needs no list of its own.
"""

from __future__ import annotations

import itertools
import logging
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
    the products; only prefill attention may change them."""
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
        compiled = list(dict.fromkeys(replace(config, splits=default.splits) for config in candidates(kernel, default)))
        for config in compiled[shard::shards]:
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
    times: dict[LaunchConfig, float] = {}
    tried = candidates(kernel, default)
    for config in tried:
        with tuning.trial(kernel, key, config):
            seconds = _time(run, measure, kernel, config)
        if seconds is not None:
            times[config] = seconds
    if default not in times:
        raise RuntimeError(f"{workload}: the default configuration of {kernel} ({key}) does not run: {default}")
    best = min(times, key=lambda config: times[config])
    failed = len(tried) - len(times)
    return Finding(workload, kernel, key, times[default], times[best], best, len(tried), failed)


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
    "paged_attention_prefill": {
        "block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4),
    },
    "mla_decode": {"block_m": (16, 64), "block_n": (16, 32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "packed_gemm": {
        "block_n": (32, 64, 128), "block_k": (32, 64, 128), "num_stages": (3, 5, 7), "splits": (0, 1, 2, 4, 8),
    },
    "scaled_gemm": {"block_n": (32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "grouped_packed": {"block_n": (32, 64, 128), "block_k": (32, 64, 128), "num_stages": (3, 5)},
    "grouped_gemm": {"block_n": (64, 128, 256), "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
}  # fmt: skip
