"""Our scheduler against first come, first served with a constant token budget, on a simulated clock.

The step costs are those of an 8B model in bfloat16 on one H200 by its bandwidth and arithmetic (4 ms to read the
weights, 20 us a prefill token, attention on top); nothing is computed. Policies: "fcfs"; "fixed" is ours with an
inter-token target of 50 ms, "ours" with one of 2.5 times what decodes alone take, "+host" has host memory below it.

Run: python benchmarks/scheduler.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable

from octavo_engine.scheduler.limits import ITL_STRETCH, SchedulerLimits
from octavo_engine.scheduler.simulation import SimulatedRequest, Simulation, SimulationResult
from octavo_engine.scheduler.step_time import StepLoad

OURS = SchedulerLimits(max_num_seqs=128, max_num_batched_tokens=8_192, itl_target_s=0.05, itl_stretch=ITL_STRETCH)
FIXED_TARGET = dataclasses.replace(OURS, itl_stretch=0.0)
FCFS = SchedulerLimits(
    max_num_seqs=128,
    max_num_batched_tokens=8_192,
    max_num_partial_prefills=1,
    max_overtakes=0,
    overtake_window=1,
    watermark=0.0,
    growth_reserve=0.0,
)
NUM_BLOCKS = 12_000
HOST_BLOCKS = 50_000
COPY_SECONDS = (2 << 20) / 25e9  # a block of 16 tokens x 128 KiB over PCIe 5 at 25 GB/s


def step_seconds(load: StepLoad) -> float:
    return 0.004 + 20e-6 * load.num_tokens + 30e-9 * load.decode_context + 1.5e-9 * load.prefill_pairs


def prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, 30_000) for _ in range(length))


def chat_with_long_prompts(rng: random.Random) -> list[SimulatedRequest]:
    """Short chats at 12 requests a second, and a 32,000-token prompt every 5 seconds."""
    requests = [
        SimulatedRequest(f"chat{i}", i / 12, prompt(rng, rng.randint(50, 600)), rng.randint(50, 250))
        for i in range(480)
    ]
    return requests + [SimulatedRequest(f"long{i}", 2 + 5 * i, prompt(rng, 32_000), 100) for i in range(8)]


def noisy_neighbour(rng: random.Random) -> list[SimulatedRequest]:
    """One tenant sends 600 requests at once; another sends two a second."""
    flood = [
        SimulatedRequest(f"flood{i}", 1.0, prompt(rng, rng.randint(500, 3_000)), rng.randint(200, 500), "flood")
        for i in range(600)
    ]
    quiet = [SimulatedRequest(f"quiet{i}", 2 + i / 2, prompt(rng, 300), 100, "quiet") for i in range(60)]
    return flood + quiet


def memory_pressure(rng: random.Random) -> list[SimulatedRequest]:
    """More context than the cache holds: preemption and heads that do not fit."""
    return [
        SimulatedRequest(f"r{i}", i / 20, prompt(rng, rng.choice([200, 800, 12_000])), rng.randint(300, 900))
        for i in range(300)
    ]


def returning_conversations(rng: random.Random) -> list[SimulatedRequest]:
    """100 conversations of 4,000 tokens, twice what the cache holds; each says something new every 25 s or so."""
    requests = []
    for talk in range(100):
        history = prompt(rng, 4_000)
        for turn in range(4):
            history += prompt(rng, 60)
            arrival_s = 25 * turn + rng.uniform(0, 25)
            requests.append(SimulatedRequest(f"talk{talk}-{turn}", arrival_s, history, 60, "returning"))
    return requests


def is_short(request: SimulatedRequest) -> bool:
    return request.tenant == "returning" or (len(request.prompt) < 1_000 and request.tenant != "flood")


def report(title: str, policy: str, results: list[SimulationResult]) -> None:
    def mean(measure: Callable[[SimulationResult], float]) -> float:
        return sum(measure(result) for result in results) / len(results)

    tokens = mean(lambda r: sum(len(t.token_times_s) for t in r.timelines.values()))
    print(
        f"{title:24} {policy:5} {mean(lambda r: r.ttft_s(is_short, 0.5)) * 1e3:9.0f} "
        f"{mean(lambda r: r.ttft_s(is_short, 0.99)) * 1e3:9.0f} "
        f"{mean(lambda r: r.gap_s(lambda _: True, 0.5)) * 1e3:8.1f} "
        f"{mean(lambda r: r.gap_s(lambda _: True, 0.99)) * 1e3:8.1f} {mean(lambda r: r.seconds):8.1f} "
        f"{tokens / mean(lambda r: r.seconds):8.0f} {mean(lambda r: r.num_preemptions):8.0f}"
    )


WORKLOADS = (chat_with_long_prompts, noisy_neighbour, memory_pressure, returning_conversations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workload", choices=[trace.__name__ for trace in WORKLOADS], help="only this one")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    print(
        f"{'workload':24} {'':5} {'ttft p50':>9} {'ttft p99':>9} {'itl p50':>8} {'itl p99':>8} {'total s':>8} "
        f"{'tok/s':>8} {'preempt':>8}   (ms; ttft of short requests and of returning ones)"
    )
    for trace in WORKLOADS:
        if arguments.workload not in (None, trace.__name__):
            continue
        for policy, limits, host_blocks in (
            ("fcfs", FCFS, 0),
            ("fixed", FIXED_TARGET, 0),
            ("ours", OURS, 0),
            ("+host", OURS, HOST_BLOCKS),
        ):
            results = []
            for seed in seeds:
                simulation = Simulation(
                    limits,
                    num_blocks=NUM_BLOCKS,
                    step_seconds=step_seconds,
                    num_host_blocks=host_blocks,
                    copy_seconds=COPY_SECONDS,
                )
                results.append(simulation.run(trace(random.Random(seed))))
            report(trace.__name__.replace("_", " "), policy, results)


if __name__ == "__main__":
    main()
