"""Check and time every GPU kernel: against its reference, against what this card can do, against torch's own kernels.

    python benchmarks/gpu_kernels.py [--only TEXT ...] [--shard 0/4] [--check-only] [--output FILE]

Each workload is first run on plain torch with the same inputs and compared; a mismatch is shown in the table and makes
the run exit 1. Then it is timed as a CUDA graph with a cold L2 cache and put beside the least time that its bytes and
operations allow at the copy bandwidth and the matrix rate measured in this run: `share` is that least time over the
measured one. Run it before and after `octavo tune`. Without a CUDA device it exits 2.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from octavo_kernels import registry
from octavo_kernels.registry import use_backends

if TYPE_CHECKING:
    from octavo_kernels.triton.timing import Limits
    from octavo_kernels.triton.workloads import Call

MISMATCH = 0.03  # relative: bfloat16 results of different summation orders and roundings differ by less
CHECK_BYTES = 8 << 30  # references of larger workloads would take too long
HEADER = "| workload | backend | median us | spread | GB/s | TFLOP/s | share | peer us | peer / ours | error |"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in seconds. error: root mean square of the difference over that of
    the expected values, None if not checked."""

    name: str
    backend: str
    median_s: float
    spread: float
    bytes_s: float
    flops_s: float
    share: float
    peer: str
    peer_s: float
    error: float | None

    @property
    def right(self) -> bool:
        return self.error is None or self.error < MISMATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="workloads whose name contains one of these texts")
    parser.add_argument("--shard", default="0/1", help="K/N: every N-th workload from the K-th; for parallel checks")
    parser.add_argument("--check-only", action="store_true", help="compare with the references, do not time")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels: PyTorch finds no CUDA device; nothing was measured", file=sys.stderr)
        sys.exit(2)
    from octavo_kernels.triton.timing import Limits, measure_limits
    from octavo_kernels.triton.workloads import workloads

    limits = Limits(1.0, 1.0) if arguments.check_only else measure_limits()
    lines = [*_title(limits), HEADER, "|" + "---|" * 10]
    print("\n".join(lines), flush=True)
    wrong = 0
    shard, shards = (int(part) for part in arguments.shard.split("/"))
    for number, workload in enumerate(workloads()):
        if number % shards != shard or not any(text in workload.name for text in arguments.only):
            continue
        torch.manual_seed(0)
        row = _measure(workload.name, workload.prepare, limits, not arguments.check_only)
        wrong += not row.right
        lines.append(_line(row))
        print(lines[-1], flush=True)
        if arguments.output:  # after each row: a run that is cut off keeps what it measured
            arguments.output.write_text("\n".join(lines) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    if wrong:
        sys.exit(f"gpu_kernels: {wrong} workloads differ from their references")


def _measure(name: str, prepare: Callable[[torch.device], Call], limits: Limits, timed: bool) -> Row:
    from octavo_kernels.triton.timing import time_call

    call = prepare(torch.device("cuda"))
    before = set(registry.choices())
    error = _error(call) if call.bytes < CHECK_BYTES else None
    backend = ", ".join(sorted({choice.backend for choice in set(registry.choices()) - before})) or "as above"
    if not timed:
        return Row(name, backend, 0, 0, 0, 0, 0, "", 0, error)
    timing = time_call(call.run)
    peers = {peer: time_call(run).median_s for peer, run in call.peers}
    peer = min(peers, key=lambda key: peers[key]) if peers else ""
    return Row(
        name,
        backend,
        timing.median_s,
        (timing.high_s - timing.low_s) / timing.median_s,
        call.bytes / timing.median_s,
        call.flops / timing.median_s,
        limits.least_seconds(call.bytes, call.flops) / timing.median_s,
        peer,
        peers.get(peer, 0.0),
        error,
    )


def _error(call: Call) -> float:
    """Relative difference between our result and the reference's (see `Row`); infinite where one is not a number."""
    call.reset()
    ours = _floats(call.run())
    call.reset()
    with use_backends("reference"):
        wanted = _floats(call.run())
    worst = 0.0
    for found, expected in zip(ours, wanted, strict=True):
        error = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _floats(result: object) -> list[torch.Tensor]:
    """Results as float tensors; a finite stand-in for the -inf of excluded tokens."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [x.detach().clone().float().nan_to_num(nan=float("nan"), neginf=-1e4) for x in tensors if x is not None]


def _title(limits: Limits) -> list[str]:
    import triton

    today = datetime.now(UTC).date().isoformat()
    return [
        f"# GPU kernels on {torch.cuda.get_device_name()}, {today}",
        "",
        f"torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}, {platform.platform()}.",
        f"Measured in this run: copy {limits.copy_bytes_s / 1e12:.2f} TB/s, bf16 product "
        f"{limits.bf16_flops_s / 1e12:.0f} TFLOP/s.",
        "",
    ]


def _line(row: Row) -> str:
    peer = f"{row.peer_s * 1e6:.1f} ({row.peer})" if row.peer else "-"
    ratio = f"{row.peer_s / row.median_s:.2f}" if row.peer else "-"
    error = "not checked" if row.error is None else f"{row.error:.1e}" + ("" if row.right else " WRONG")
    flops = f"{row.flops_s / 1e12:.1f}" if row.flops_s else "-"
    return (
        f"| {row.name} | {row.backend} | {row.median_s * 1e6:.1f} | {row.spread:.0%} | {row.bytes_s / 1e9:.0f} "
        f"| {flops} | {row.share:.0%} | {peer} | {ratio} | {error} |"
    )


if __name__ == "__main__":
    main()
