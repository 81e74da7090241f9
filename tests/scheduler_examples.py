"""Loads and costs that the tests of the scheduler share."""

from __future__ import annotations

import random

from octavo_engine.messages import AddRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler.limits import SchedulerLimits
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad


def true_cost(load: StepLoad) -> float:
    return 0.004 + 20e-6 * load.num_tokens + 30e-9 * load.decode_context + 1.5e-9 * load.prefill_pairs


def limits(**changes: object) -> SchedulerLimits:
    return SchedulerLimits(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **changes})  # type: ignore[arg-type]


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, 30_000) for _ in range(count))


def sequence(name: str, arrival_s: float = 0.0, prompt: int = 4, **fields: object) -> Sequence:
    message = AddRequest(
        request_id=name,
        prompt_token_ids=[1] * prompt,
        sampling=SamplingParams(),
        **fields,  # type: ignore[arg-type]
    )
    return Sequence(message, arrival_s)
