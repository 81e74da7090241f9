"""A long prompt beside streams: what it takes longer than alone, against the least it could, and what the streams feel.

Every stream gets a token in every step. If no gap may be longer than S times the idle one, 1/S of the time is theirs,
and the prompt needs at least S / (S - 1) times as long as alone: 1.5 times for S = 3. The scheduler is measured on a
simulated clock (step costs of an 8B model on one H200, as in scheduler.py) and, with --model, in the whole engine.

With --threads 1 the engine's time is its processor time, which other programs lengthen little.

Run: python benchmarks/long_prompt.py [--model smollm2.gguf --streams 1 4 --prompt 1500]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from scheduler import OURS, prompt, step_seconds

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.loader.load import load_runner
from octavo_engine.messages import AddRequest, ModelInfo
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler.limits import ITL_STRETCH
from octavo_engine.scheduler.simulation import SimulatedRequest, Simulation
from octavo_engine.scheduler.step_time import StepLoad

LEAST = ITL_STRETCH / (ITL_STRETCH - 1)
LATE_TOKENS = 100
STREAM_TOKENS = 700
IDLE_TOKENS = 300

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Beside:
    """Seconds: to the long prompt's first token alone and beside streams; the streams' gaps while nothing else runs and
    beside it; to a late prompt's first token."""

    alone_s: float
    long_s: float
    idle_gap_s: float
    idle_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    late_s: float
    idle_late_s: float


def simulated(num_streams: int, length: int, noise: float) -> Beside:
    """On a simulated clock, steps `noise` shorter or longer by chance."""
    rng = random.Random(num_streams)
    streams = [SimulatedRequest(f"s{i}", 0.0, prompt(rng, 60), STREAM_TOKENS) for i in range(num_streams)]
    long = SimulatedRequest("long", 1.0, prompt(rng, length), 10)
    late = SimulatedRequest("late", 1.6, prompt(rng, LATE_TOKENS), 10)

    def run(requests: Iterable[SimulatedRequest]) -> tuple[dict[str, float], list[float]]:
        noises = random.Random(length)

        def seconds(load: StepLoad) -> float:
            return step_seconds(load) * noises.uniform(1 - noise, 1 + noise)

        result = Simulation(OURS, num_blocks=9_000, step_seconds=seconds).run(requests)
        first = {name: timeline.ttft_s for name, timeline in result.timelines.items()}
        times = [t for timeline in result.timelines.values() if timeline.request in streams for t in timeline.gaps_s]
        return first, times

    idle_first, idle = run([*streams, late])
    first, gaps = run([*streams, long, late])
    alone_s = run([long])[0]["long"]
    return Beside(
        alone_s, first["long"], *usual_and_longest(idle), *usual_and_longest(gaps), first["late"], idle_first["late"]
    )


def measured(core: EngineCore, info: ModelInfo, clock: Clock, num_streams: int, length: int) -> Beside:
    """In the engine itself: streams until they are steady, then the long prompt, then a late one behind it."""
    vocab_size, rng = info.vocab_size, random.Random(num_streams)

    def add(name: str, num_tokens: int, max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        tokens = [rng.randrange(10, vocab_size) for _ in range(num_tokens)]
        core.add(AddRequest(request_id=name, prompt_token_ids=tokens, sampling=sampling))

    times: dict[str, list[float]] = {}

    def steps(until: Callable[[], bool]) -> None:
        while not until():
            for output in core.step().outputs:
                times.setdefault(output.request_id, []).extend([clock()] * len(output.token_ids))

    def first_token(name: str, num_tokens: int) -> float:
        started = clock()
        add(name, num_tokens, 2)
        steps(lambda: name in times)
        return times[name][0] - started

    alone_s = first_token("alone", length)
    streams = [f"stream{i}" for i in range(num_streams)]
    for name in streams:
        add(name, 20, info.max_model_len - 20)
    steps(lambda: all(len(times.get(name, ())) >= 40 + IDLE_TOKENS for name in streams))
    idle = [gap for name in streams for gap, _ in gaps_of(times[name][-IDLE_TOKENS:])]
    idle_late_s = first_token("late alone", LATE_TOKENS)
    started = clock()
    add("long", length, 2)
    steps(lambda: clock() - started > alone_s / 2)
    late_s = first_token("late", LATE_TOKENS)
    steps(lambda: "long" in times)
    ended = times["long"][0]
    gaps = [gap for name in streams for gap, at in gaps_of(times[name]) if started <= at <= ended]
    core.abort(streams)
    steps(lambda: not core.has_work)
    return Beside(alone_s, ended - started, *usual_and_longest(idle), *usual_and_longest(gaps), late_s, idle_late_s)


def gaps_of(times: list[float]) -> list[tuple[float, float]]:
    """Each time between two tokens, and when it ended."""
    return [(later - earlier, later) for earlier, later in pairwise(times)]


def usual_and_longest(values: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    return statistics.median(values), sorted(values)[int(0.99 * (len(values) - 1))]


def row(name: str, streams: int, length: int, found: Beside) -> str:
    ratio = found.long_s / found.alone_s
    return (
        f"| {name} | {streams} | {length:,} | {found.alone_s:.2f} | {found.long_s:.2f} | {ratio:.2f} | "
        f"{ratio / LEAST:.2f} | {found.idle_gap_s * 1e3:.1f} | {found.idle_p99_s / found.idle_gap_s:.2f} | "
        f"{found.gap_p50_s / found.idle_gap_s:.2f} | {found.gap_p99_s / found.idle_gap_s:.2f} | "
        f"{found.gap_p99_s / found.idle_p99_s:.2f} | "
        f"{found.idle_late_s * 1e3:.0f} | {found.late_s * 1e3:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="measure the engine with this model too")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, help="tokens; 32,000 simulated, 1,500 in the engine")
    parser.add_argument("--repeat", type=int, default=3, help="runs in the engine; each is printed")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    print(
        "| run | streams | prompt | alone s | beside s | ratio | / least | idle gap ms | "
        "idle p99 / idle | gap / idle | gap p99 / idle | gap p99 / idle p99 | "
        f"first token of {LATE_TOKENS}, idle ms | behind the prompt ms |\n" + "|---" * 14 + "|"
    )
    for noise in (0.0, 0.1):
        for streams in arguments.streams:
            length = arguments.prompt or 32_000
            print(row(f"simulated, {noise:.0%} noise", streams, length, simulated(streams, length, noise)), flush=True)
    if arguments.model:
        length = arguments.prompt or 1_500
        config = EngineConfig(
            model=arguments.model, max_num_seqs=64, enable_prefix_caching=False, num_threads=arguments.threads
        )
        torch.manual_seed(0)
        runner = load_runner(config, lambda _: None)
        clock = time.process_time if arguments.threads == 1 else time.perf_counter
        core = EngineCore(runner, config, clock=clock)
        for run in range(arguments.repeat):
            for streams in arguments.streams:
                print(
                    row(f"engine, run {run + 1}", streams, length, measured(core, runner.info, clock, streams, length)),
                    flush=True,
                )


if __name__ == "__main__":
    main()
