"""What adapters cost a native decode step: batches of 1 and 8 with and without, and what placing one in a slot takes.

The model is SmolLM2-135M (Q4_1), adapters are random. With one thread processor time is taken, which other programs do
not lengthen; steps of all kinds take turns, and the best of each counts. Run: python benchmarks/cpu_adapters.py
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from cpu_kernels import SMOLLM2, best_of, slices

from octavo_engine.config import EngineConfig
from octavo_engine.loader.load import load_runner
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_kernels import cpu
from octavo_kernels.cpu.step import NativeStep
from octavo_kernels.step import DecoderPlan, LowRankChange, Projection

SLOTS = 4
CONTEXT = 127
KINDS = (("q, k, v", 8), ("all seven", 8), ("all seven", 16), ("all seven", 64))


def random_adapter(plan: DecoderPlan, projections: str, rank: int) -> list[LowRankChange]:
    """Changes of every layer, bfloat16."""
    query, kv = plan.num_heads * plan.head_dim, plan.num_kv_heads * plan.head_dim
    hidden, inner = plan.hidden_size, plan.intermediate_size
    places = [
        (Projection.QKV, 0, query, hidden),
        (Projection.QKV, query, kv, hidden),
        (Projection.QKV, query + kv, kv, hidden),
        (Projection.OUTPUT, 0, hidden, query),
        (Projection.GATE_UP, 0, inner, hidden),
        (Projection.GATE_UP, inner, inner, hidden),
        (Projection.DOWN, 0, hidden, inner),
    ]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * 0.01).to(torch.bfloat16)

    return [
        LowRankChange(layer, projection, first, matrix(rank, columns), matrix(rows, rank), 1.0)
        for layer in range(len(plan.layers))
        for projection, first, rows, columns in places[: 3 if projections == "q, k, v" else None]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=25, help="steps of each kind")
    arguments = parser.parse_args()
    config = EngineConfig(
        model=SMOLLM2, num_threads=arguments.threads, num_kv_blocks=200, enable_lora=True, max_loras=SLOTS
    )
    runner = load_runner(config, lambda progress: None)
    assert isinstance(runner, TorchModelRunner)
    step, plan = runner.compiled_step, runner.model.plan()
    if not isinstance(step, NativeStep) or plan is None:
        raise SystemExit("no whole native step here: see `octavo doctor`")
    clock = time.process_time if cpu.num_threads() == 1 else time.perf_counter
    print(f"{cpu.instruction_set()}, {cpu.num_threads()} thread(s), context {CONTEXT + 1}\n")
    print("| projections, rank | sequences | adapters | ms without | ms with | ratio | ms to place one |")
    print("|---|---|---|---|---|---|---|")
    for projections, rank in KINDS:
        adapters = [random_adapter(plan, projections, rank) for _ in range(SLOTS)]
        placing = min(  # matrices never packed before
            best_of(1, time.perf_counter, lambda: step.place_adapter(slot, adapter))  # noqa: B023
            for slot, adapter in enumerate(adapters)
        )
        for sequences, different in ((1, 1), (8, 1), (8, SLOTS)):
            plain = slices(sequences, CONTEXT, 1)
            adapted = [replace(piece, adapter_slot=i % different) for i, piece in enumerate(plain)]
            best = [float("inf"), float("inf")]
            for _ in range(arguments.runs):
                for kind, pieces in enumerate((plain, adapted)):
                    best[kind] = min(best[kind], best_of(1, clock, lambda: runner.forward(pieces)))  # noqa: B023
            without, with_them = (seconds * 1e3 for seconds in best)
            print(
                f"| {projections}, {rank} | {sequences} | {different} | {without:.2f} | {with_them:.2f} | "
                f"{with_them / without:.2f} | {placing * 1e3:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
