"""Everything a GPU has to show, in one run: correctness, memory safety, speed, tuning, and speed again.

    python benchmarks/gpu_run.py [--folder benchmarks/results] [--skip STAGE ...] [--limit-s 1700]

Stages, each with its own time limit and log, later ones still run when one fails:
  tests      the kernel tests on the device
  check      every workload against its reference (gpu_kernels.py --check-only)
  sanitizer  compute-sanitizer memcheck over small workloads, where the CUDA toolkit is installed
  kernels    the kernel table with default configurations
  tune       octavo tune
  tuned      the kernel table again
  engine     decode and prefill steps of whole models
Prints one summary at the end and exits 1 if a stage failed, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu_run"
SMALL = ["rms_norm 8192", "rope_and_store_kv 64", "decode 1 x 4k", "verify 16", "adapters", "router", "token_logprobs"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, the most seconds it may take, and what it needs beside the device."""

    name: str
    command: list[str]
    limit_s: int
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended: `passed`, `failed`, `timed out` or `skipped`."""

    name: str
    ended: str
    seconds: float
    note: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--skip", nargs="*", default=[], help="stages to leave out")
    parser.add_argument("--limit-s", type=int, default=1_700, help="seconds for everything")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu_run: PyTorch finds no CUDA device; nothing was run", file=sys.stderr)
        sys.exit(2)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.limit_s
    outcomes = []
    for stage in stages(arguments.folder, torch.cuda.get_device_name().lower().replace(" ", "_")):
        left = end - time.monotonic()
        if stage.name in arguments.skip or left < 10:
            outcomes.append(Outcome(stage.name, "skipped", 0, "left out" if left >= 10 else "no time left"))
        else:
            outcomes.append(run(stage, left))
        print(line(outcomes[-1]), flush=True)
    print("\n| stage | ended | seconds | note |\n|---|---|---|---|")
    print("\n".join(line(outcome) for outcome in outcomes))
    if any(outcome.ended in ("failed", "timed out") for outcome in outcomes):
        sys.exit(1)


def stages(folder: Path, device: str) -> list[Stage]:
    """All stages, in order."""
    python, kernels = sys.executable, str(ROOT / "benchmarks" / "gpu_kernels.py")
    engine = str(ROOT / "benchmarks" / "gpu_engine.py")
    tests = [python, "-m", "pytest", str(ROOT / "tests" / "kernels" / "triton"), "-q", "-m", "not slow", "-x"]
    memcheck = ["compute-sanitizer", "--error-exitcode", "9", python, kernels, "--check-only", "--only", *SMALL]
    return [
        Stage("tests", tests, 420),
        Stage("check", [python, kernels, "--check-only"], 300),
        Stage("sanitizer", memcheck, 240, needs="compute-sanitizer"),
        Stage("kernels", [python, kernels, "--output", str(folder / f"gpu_kernels_{device}.md")], 300),
        Stage("tune", [python, "-m", "octavo_cli.main", "tune"], 420),
        Stage("tuned", [python, kernels, "--output", str(folder / f"gpu_kernels_{device}_tuned.md")], 300),
        Stage("engine", [python, engine, "--output", str(folder / f"gpu_engine_{device}.md")], 420),
    ]


def run(stage: Stage, left_s: float) -> Outcome:
    """Run one stage with its output in build/gpu_run/<stage>.log."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Outcome(stage.name, "skipped", 0, f"{stage.needs} is not installed")
    log = LOGS / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                stage.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ.copy(),
                timeout=min(stage.limit_s, left_s), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome(stage.name, "timed out", time.monotonic() - start, f"see {log}")
    ended = "passed" if done.returncode == 0 else "failed"
    last = (log.read_text().strip().splitlines() or [""])[-1][:120]
    return Outcome(stage.name, ended, time.monotonic() - start, last.replace("|", " ") if ended == "failed" else "")


def line(outcome: Outcome) -> str:
    return f"| {outcome.name} | {outcome.ended} | {outcome.seconds:.0f} | {outcome.note} |"


if __name__ == "__main__":
    main()
