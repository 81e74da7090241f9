"""`octavo tune`: measure launch configurations of the GPU kernels on this machine's device and keep the best."""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from octavo_kernels.triton.autotune import Finding
    from octavo_kernels.triton.tuning import Table
    from octavo_kernels.triton.workloads import Workload


def tune(
    only: Annotated[str, typer.Option(help="Tune on workloads whose name contains this text.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder to write to instead of the user's cache.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile candidates beforehand.")] = 8,
    limit_s: Annotated[int, typer.Option(min=0, help="Begin no workload after this many seconds; 0: tune all.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the workloads and exit.")] = False,
) -> None:
    """Measure kernel configurations on this GPU and keep the fastest.

    Writes one small file for the device, which every replica on such a device reads at start. Nothing is ever tuned
    while serving.
    """
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        raise _refusal("Triton is not installed; pip install 'octavo[gpu]'") from error
    import torch

    if not torch.cuda.is_available():
        raise _refusal("PyTorch finds no CUDA device; run this on the machine that will serve")
    from octavo_kernels.triton import autotune, timing, tuning, workloads

    chosen = sorted((workload for workload in workloads.workloads() if only in workload.name), key=_urgency)
    if not chosen:
        raise _refusal(f"no workload has {only!r} in its name; --dry-run lists them")
    if dry_run:
        typer.echo("\n".join(workload.name for workload in chosen))
        return
    name = torch.cuda.get_device_name()
    typer.echo(f"Tuning {len(chosen)} workloads on {name}")
    path = (output or tuning.user_dir()) / tuning.file_name(name)
    end, better, versions = time.monotonic() + (limit_s or math.inf), 0, _versions()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for number, workload in enumerate(chosen):
            if time.monotonic() > end:
                typer.echo(f"{len(chosen) - number} of {len(chosen)} workloads were left out after {limit_s} s")
                break
            list(pool.map(_compile_shard, [(workload.name, shard, jobs) for shard in range(jobs)]))
            found = autotune.tune([workload], torch.device("cuda"), lambda run: timing.time_call(run).median_s, _report)
            better += sum(map(len, found.values()))
            tuning.write_table(path, name, versions, _merged(path, found))  # kept if the rest is cut off
    typer.echo(f"{better} configurations better than the defaults, in {path}")


def _urgency(workload: Workload) -> int:
    """Kernels that were measured furthest from the card's limits come first, while there is time."""
    return next((place for place, text in enumerate(_FURTHEST) if text in workload.name), len(_FURTHEST))


_FURTHEST = ("int4", "Q4_", "MXFP4", "Q8_0", "int8 ", "shared", "prefill", "silu_and_mul_quantize", "verify", "Q6_K")


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _compile_shard(task: tuple[str, int, int]) -> int:
    """One process's share of a workload's candidates: compiling takes far longer than timing."""
    import torch

    from octavo_kernels.triton import autotune, workloads

    name, shard, shards = task
    workload = next(workload for workload in workloads.workloads() if workload.name == name)
    compiled = autotune.compile_candidates(workload, torch.device("cuda"), shard, shards)
    torch.cuda.empty_cache()
    return compiled


def _merged(path: Path, found: Table) -> Table:
    """What the file had before, with the new findings over it: `--only` must not lose the rest."""
    from octavo_kernels.triton.tuning import read_table

    before = read_table(path) if path.is_file() else {}
    return {kernel: before.get(kernel, {}) | found.get(kernel, {}) for kernel in before.keys() | found.keys()}


def _report(finding: Finding) -> None:
    change = f"{finding.default_s / finding.best_s:.2f}x" if finding.improved else "default kept"
    times = f"{finding.default_s * 1e6:9.1f} us -> {finding.best_s * 1e6:9.1f} us"
    left_out = f", {finding.failed} of {finding.tried} did not fit" if finding.failed else ""
    typer.echo(f"{finding.workload:<44} {finding.kernel:<24} {times}  {change}{left_out}")


def _refusal(message: str) -> SystemExit:
    typer.echo(f"octavo tune: {message}", err=True)
    return SystemExit(1)
