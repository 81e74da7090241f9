"""What the compiler makes of every kernel for Hopper, without a GPU: registers, spills, shared memory, occupancy.

    python benchmarks/gpu_static.py [--only TEXT ...] [--output benchmarks/results/gpu_static_sm90.md] [--candidates]

Static analysis, not a measurement: it shows that every launch compiles to machine code, that nothing spills, and how
many programs fit a multiprocessor. Workloads are those of the GPU benchmark, on tensors without memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

os.environ["OCTAVO_TRITON_COMPILE_ONLY"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from octavo_kernels.registry import use_backends
from octavo_kernels.triton.offline import KernelReport, compile_launches, tools_are_here
from octavo_kernels.triton.workloads import workloads

HEADER = (
    "| workload | kernel | registers | spilled bytes | shared bytes | warps | programs a multiprocessor | matrix unit |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="workloads whose name contains one of these texts")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--candidates", action="store_true", help="compile all that `octavo tune` would try instead")
    arguments = parser.parse_args()
    if not tools_are_here():
        sys.exit("gpu_static: the Triton wheel brought no ptxas and cuobjdump; install triton for Linux on x86-64")
    if arguments.candidates:
        _compile_candidates(arguments.only)
        return
    lines = [*_title(), HEADER, "|" + "---|" * 8]
    print("\n".join(lines), flush=True)
    seen: set[KernelReport] = set()
    with use_backends("triton"):
        for workload in workloads():
            if not any(text in workload.name for text in arguments.only):
                continue
            for report in compile_launches(lambda prepare=workload.prepare: prepare(torch.device("meta")).run()):
                if report not in seen:
                    seen.add(report)
                    lines.append(_line(workload.name, report))
                    print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def _compile_candidates(only: list[str]) -> None:
    """For each kernel and shape: how many candidates there are, how many of them fit a multiprocessor, how many spill
    and how many the compiler refuses. The tuner passes over those that do not fit."""
    from octavo_kernels.triton import autotune, tuning
    from octavo_kernels.triton.offline import SHARED_PER_SM

    print(
        "| workload | kernel | candidates | fit | spill | failed |", "|---|---|---|---|---|---|", sep="\n", flush=True
    )
    seen: set[tuple[str, str]] = set()
    with use_backends("triton"):
        for workload in (w for w in workloads() if any(text in w.name for text in only)):
            call = workload.prepare(torch.device("meta"))
            with tuning.recording() as asked:
                compile_launches(call.run)
            for (kernel, key), default in asked.items():
                if (kernel, key) in seen:
                    continue
                seen.add((kernel, key))
                fit = spill = failed = 0
                tried = autotune.candidates(kernel, default)
                for config in tried:
                    with tuning.trial(kernel, key, config):
                        try:
                            reports = compile_launches(call.run)
                        except (triton.runtime.errors.PTXASError, triton.compiler.errors.CompilationError):
                            failed += 1
                            continue
                    fit += all(report.shared_bytes <= SHARED_PER_SM - 1_024 for report in reports)
                    spill += any(report.spill_bytes for report in reports)
                print(f"| {workload.name} | {kernel} | {len(tried)} | {fit} | {spill} | {failed} |", flush=True)


def _title() -> list[str]:
    today = datetime.now(UTC).date().isoformat()
    return [
        "# Kernels compiled for compute capability 9.0 (H100, H200)",
        "",
        f"Static analysis by ptxas, not a measurement. {today}, Triton {triton.__version__}.",
        "",
    ]


def _line(workload: str, report: KernelReport) -> str:
    values = (
        workload, report.kernel, report.registers, report.spill_bytes, report.shared_bytes, report.num_warps,
        report.programs_per_sm, report.matrix_instruction,
    )  # fmt: skip
    return "| " + " | ".join(str(value) for value in values) + " |"


if __name__ == "__main__":
    main()
