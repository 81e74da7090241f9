"""Three times more than an engine can do, for minutes on a simulated clock: a bounded queue, the same goodput."""

from __future__ import annotations

import random

import pytest

from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.limits import ITL_STRETCH, SchedulerLimits
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.simulation import SimulatedRequest, Simulation, SimulationResult
from octavo_engine.scheduler.step_time import StepLoad

MAX_QUEUED = 64
LIMITS = SchedulerLimits(
    max_num_seqs=32, max_num_batched_tokens=2_048, itl_target_s=0.05, itl_stretch=ITL_STRETCH,
    max_queued_requests=MAX_QUEUED,
)  # fmt: skip
CAPACITY = 20.0  # requests a second that this engine just about serves


def step_seconds(load: StepLoad) -> float:
    return 0.01 + 40e-6 * load.num_tokens + 30e-9 * load.decode_context + 1.5e-9 * load.prefill_pairs


def arrivals(rate: float, seconds: float) -> list[SimulatedRequest]:
    rng = random.Random(int(rate))
    found, now = [], 0.0
    while now < seconds:
        now += rng.expovariate(rate)
        prompt = tuple(rng.randrange(2, 30_000) for _ in range(rng.randint(20, 400)))
        found.append(SimulatedRequest(f"r{len(found)}", now, prompt, rng.randint(20, 120)))
    return found


def served(rate: float, seconds: float) -> tuple[SimulationResult, int]:
    deepest = 0

    def look(scheduler: Scheduler, batch: Batch) -> None:
        nonlocal deepest
        deepest = max(deepest, scheduler.num_waiting)

    simulation = Simulation(LIMITS, num_blocks=2_000, step_seconds=step_seconds, on_step=look)
    result = simulation.run(arrivals(rate, seconds))
    assert simulation.pool.num_used == 0
    return result, deepest


@pytest.mark.parametrize("seconds", [40.0, pytest.param(300.0, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_three_times_the_capacity_costs_no_goodput_and_no_memory(seconds: float) -> None:
    at_capacity, _ = served(CAPACITY, seconds)
    overloaded, deepest = served(3 * CAPACITY, seconds)

    def goodput(result: SimulationResult) -> float:
        done = [t for t in result.timelines.values() if t.finished_s is not None]
        return sum(len(t.token_times_s) for t in done) / result.seconds

    rejected = sum(t.rejected for t in overloaded.timelines.values())
    assert deepest <= MAX_QUEUED + LIMITS.max_num_seqs  # the places of the batch that are free count as none waiting
    assert rejected > len(overloaded.timelines) / 3
    assert goodput(overloaded) >= 0.9 * goodput(at_capacity)
    admitted = [t for t in overloaded.timelines.values() if not t.rejected]
    assert all(t.finished_s is not None and len(t.token_times_s) == t.request.num_output_tokens for t in admitted)
    waits = sorted(t.ttft_s for t in admitted)
    longest_output_s = 2 * (MAX_QUEUED + LIMITS.max_num_seqs) / CAPACITY
    assert waits[int(0.99 * len(waits))] < longest_output_s
