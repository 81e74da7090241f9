"""A long prompt beside streams takes the time that the streams can spare, and not more."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest

from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.limits import ITL_STRETCH, SchedulerLimits
from octavo_engine.scheduler.prefill import STEPS_BETWEEN_PAUSES
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.simulation import SimulatedRequest, Simulation
from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel

LIMITS = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=256, itl_target_s=0.2, itl_stretch=ITL_STRETCH)
LONG_ARRIVES_S = 4.0


def two_cores(load: StepLoad) -> float:
    """As measured for a small model: rows are free up to two, and attention is dear."""
    rows_s = 7e-4 * max(0, load.num_tokens - 2)
    return 4.8e-3 + rows_s + 3.4e-6 * load.decode_context + 8e-7 * load.prefill_pairs


@pytest.mark.parametrize("num_streams", [4, 16])
def test_streams_keep_their_pace_beside_a_long_prompt_on_a_cpu(num_streams: int) -> None:
    rng = random.Random(3)
    chunks: list[int] = []

    def note_chunks(scheduler: Scheduler, batch: Batch) -> None:
        seq = scheduler.get("long")
        if seq in batch.sequences and seq is not None and seq.num_output_tokens == 0:
            chunks.append(len(batch.slices[batch.sequences.index(seq)].token_ids))
        elif seq is not None and seq.num_output_tokens == 0:
            chunks.append(0)

    simulation = Simulation(
        LIMITS,
        num_blocks=20_000,
        step_seconds=lambda load: two_cores(load) * rng.uniform(0.95, 1.05),
        on_step=note_chunks,
    )
    streams = [SimulatedRequest(f"s{i}", 0.0, tuple(range(20 * i + 1, 20 * i + 21)), 1_200) for i in range(num_streams)]
    long = SimulatedRequest("long", LONG_ARRIVES_S, tuple(rng.randrange(9, 9_999) for _ in range(1_500)), 2)
    timelines = simulation.run([*streams, long]).timelines
    first = timelines["long"].token_times_s[0]
    gaps, idle = [], []
    for stream in streams:
        for earlier, later in pairwise(timelines[stream.name].token_times_s):
            if earlier > LONG_ARRIVES_S and later < first:
                gaps.append(later - earlier)
            elif earlier > LONG_ARRIVES_S - 1.0 and later < LONG_ARRIVES_S:
                idle.append(later - earlier)
    assert sorted(gaps)[int(0.99 * len(gaps))] < 1.03 * ITL_STRETCH * statistics.median(idle)
    assert statistics.median(gaps) > 2.2 * statistics.median(idle)  # it takes what it may
    assert chunks.count(0) <= 1 + len(chunks) // STEPS_BETWEEN_PAUSES
    assert all(earlier or later for earlier, later in pairwise(chunks))


def test_one_unforeseen_step_does_not_shorten_the_chunks_behind_it() -> None:
    model = StepTimeModel()
    for step in range(100):
        load = StepLoad(20 + step % 7, 1_000, 4_000 + 100 * (step % 5))
        model.observe(load, two_cores(load) * (3.0 if step == 50 else 1.0))
    assert model.prefill_overrun < 1.1
