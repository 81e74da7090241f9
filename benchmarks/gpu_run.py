"""Everything a GPU has to show, in one run, in order of value, within a time that is given.

    python benchmarks/gpu_run.py [--limit-s 1700] [--folder benchmarks/results] [--model FILE.gguf | --model-parts P P]
                                 [--only STAGE ...] [--skip STAGE ...] [--device cpu]
    python benchmarks/gpu_run.py --split-model FILE.gguf    # parts of 60 MiB in build/model_parts, for small transfers

A stage has a limit of its own and gets no more than what is left of the whole; it is left out where less than its least
useful time is left. Its output goes to <folder>/gpu_run/<stage>.log as it comes, and the summary beside it is written
again after every stage, so that a run that is cut off keeps everything. Later stages run when one fails.

--device cpu runs those stages that need no GPU, as a rehearsal. Exits 1 if a stage failed, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PARTS = ROOT / "build" / "model_parts"
PART_BYTES = 60 << 20
# Small enough that the memory checker, some hundred times slower, ends; each is a kernel of its own.
CHECKED = [
    "rms_norm 8192", "rope_and_store_kv 64", "decode 1 x 4k", "verify 16", "adapters", "router", "token_logprobs",
    "int4-g128 1 rows", "Q8_0 1 rows", "apply_", "sample 64 rows top-k 50",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, the most and the least seconds for it, what it needs on the PATH, and whether a CPU will do."""

    name: str
    command: list[str]
    limit_s: int
    least_s: int = 20
    needs: str = ""
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended: `passed`, `failed`, `timed out` or `skipped`."""

    name: str
    ended: str
    seconds: float
    note: str


def main() -> None:
    arguments = _arguments()
    if arguments.split_model:
        parts = split_file(arguments.split_model, PARTS, PART_BYTES)
        print("\n".join(f"{part.stat().st_size:>12,} {part}" for part in parts))
        return
    device = _device(arguments.device)
    logs = arguments.folder / "gpu_run"
    logs.mkdir(parents=True, exist_ok=True)
    model = arguments.model
    if arguments.model_parts:
        model = join_files(arguments.model_parts, logs / "model.gguf")
    end = time.monotonic() + arguments.limit_s
    outcomes: list[Outcome] = []
    for stage in stages(arguments.folder, device, model, arguments.device):
        reason = why_not(stage, arguments, end - time.monotonic())
        outcomes.append(
            Outcome(stage.name, "skipped", 0, reason) if reason else run(stage, logs, end - time.monotonic())
        )
        print(line(outcomes[-1]), flush=True)
        (logs / "summary.md").write_text(summary(device, outcomes))
    if arguments.model_parts:
        Path(model).unlink()
    if any(outcome.ended in ("failed", "timed out") for outcome in outcomes):
        sys.exit(1)


def stages(folder: Path, device: str, model: str, kind: str = "cuda") -> list[Stage]:
    """All stages, most valuable first: is it right, how fast is an engine, what do the kernels reach, then the rest."""
    python, kernels = sys.executable, str(BENCHMARKS / "gpu_kernels.py")
    engine, checks = str(BENCHMARKS / "gpu_engine.py"), str(BENCHMARKS / "gpu_checks.py")

    def check(name: str) -> list[str]:
        return [python, checks, name, "--device", kind, "--model", model]

    def table(name: str) -> list[str]:
        return ["--output", str(folder / f"{name}_{device}.md")]

    tests = [python, "-m", "pytest", str(ROOT / "tests" / "kernels" / "triton"), "-q", "-m", "not slow", "--maxfail=20"]
    memcheck = ["compute-sanitizer", "--error-exitcode", "9", python, kernels, "--check-only", "--only", *CHECKED]
    small = [python, engine, "--models", "smollm2-135m", "--batches", "1", "64"]
    large = [python, engine, "--models", "llama-3-8b", "--batches", "1", "64", "256"]
    peers = [python, engine, "--models", "llama-3-8b", "--batches", "64", "--peer", "--peer-limit-s", "75"]
    return [
        Stage("check", [python, kernels, "--check-only"], 240, 60),
        Stage("engine-steps", check("steps"), 150, on_cpu=True),
        Stage("engine-adapters", check("adapters"), 120, on_cpu=True),
        Stage("engine-host-memory", check("host-memory"), 120, on_cpu=True),
        Stage("real-model", check("real-model"), 150, on_cpu=True),
        Stage("engine", [*large, *table("gpu_engine")], 240, 60),
        Stage("kernels", [python, kernels, *table("gpu_kernels")], 300, 90),
        Stage("peer", [*peers, *table("gpu_engine_peer")], 260, 120),
        Stage("engine-small", [*small, *table("gpu_engine_small")], 120, 40),
        Stage("nccl", check("ranks"), 60, on_cpu=True),
        Stage("tests", tests, 420, 90),
        Stage("sanitizer", memcheck, 240, 60, needs="compute-sanitizer"),
        Stage("tune", [python, "-m", "octavo_cli.main", "tune", "--limit-s", "400", "--output", str(folder)], 460, 120),
        Stage("kernels-tuned", [python, kernels, *table("gpu_kernels_tuned")], 300, 90),
    ]


def why_not(stage: Stage, arguments: argparse.Namespace, left_s: float) -> str:
    """Why a stage is left out; empty if it is not."""
    if stage.name in arguments.skip or (arguments.only and stage.name not in arguments.only):
        return "left out"
    if arguments.device == "cpu" and not stage.on_cpu:
        return "needs a GPU"
    if stage.name == "real-model" and not (arguments.model or arguments.model_parts):
        return "no --model"
    if stage.needs and shutil.which(stage.needs) is None:
        return f"{stage.needs} is not installed"
    return f"{left_s:.0f} s left, it needs {stage.least_s}" if left_s < stage.least_s else ""


def run(stage: Stage, logs: Path, left_s: float) -> Outcome:
    """Run one stage, its output in <logs>/<stage>.log; what it started ends with it."""
    log, start = logs / f"{stage.name}.log", time.monotonic()
    environment = os.environ | {"OCTAVO_TUNED_DIR": str(logs.parent)} if stage.name == "kernels-tuned" else os.environ
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout=min(stage.limit_s, left_s))
        except subprocess.TimeoutExpired:
            return Outcome(stage.name, "timed out", time.monotonic() - start, f"see {log.name}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:160].replace("|", " ")
    return Outcome(stage.name, "failed" if status else "passed", time.monotonic() - start, last)


def line(outcome: Outcome) -> str:
    return f"| {outcome.name} | {outcome.ended} | {outcome.seconds:.0f} | {outcome.note} |"


def summary(device: str, outcomes: list[Outcome]) -> str:
    """All outcomes so far as a page."""
    title = (
        f"# One run on {device}, {datetime.now(UTC).date().isoformat()}\n\n| stage | ended | seconds | last line |\n"
    )
    return title + "|---|---|---|---|\n" + "\n".join(map(line, outcomes)) + "\n"


def split_file(file: Path, folder: Path, part_bytes: int) -> list[Path]:
    """Cut a file into numbered parts of at most `part_bytes` under `folder`, older parts of it removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{file.name}.part*"):
        old.unlink()
    parts = []
    with file.open("rb") as source:
        while data := source.read(part_bytes):
            parts.append(folder / f"{file.name}.part{len(parts):02}")
            parts[-1].write_bytes(data)
    return parts


def join_files(parts: list[Path], target: Path) -> str:
    """The parts of a file, in the order of their names, as one; returns its path."""
    with target.open("wb") as output:
        for part in sorted(parts):
            with part.open("rb") as source:
                shutil.copyfileobj(source, output)
    return str(target)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BENCHMARKS / "results", help="for tables, logs and the summary")
    parser.add_argument("--only", nargs="*", default=[], help="stages to run")
    parser.add_argument("--skip", nargs="*", default=[], help="stages to leave out")
    parser.add_argument("--limit-s", type=int, default=1_700, help="seconds for everything")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="", help="a GGUF file for the stage real-model")
    parser.add_argument("--model-parts", nargs="+", type=Path, help="the same in parts")
    parser.add_argument("--split-model", type=Path, help="cut this file into parts and exit")
    return parser.parse_args()


def _device(kind: str) -> str:
    """A name for files; exits 2 without a CUDA device."""
    import torch

    if kind == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        print("gpu_run: PyTorch finds no CUDA device; nothing was run", file=sys.stderr)
        sys.exit(2)
    return torch.cuda.get_device_name().lower().replace(" ", "_")


if __name__ == "__main__":
    main()
