"""What the compiler makes of every kernel for Hopper, without a GPU: registers, spills, shared memory, occupancy.

    python benchmarks/gpu_static.py [--only TEXT ...] [--output benchmarks/results/gpu_static_sm90.md]

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
    arguments = parser.parse_args()
    if not tools_are_here():
        sys.exit("gpu_static: the Triton wheel brought no ptxas and cuobjdump; install triton for Linux on x86-64")
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
