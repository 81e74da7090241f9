"""How long a step takes is learned while the engine runs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel
from scheduler_examples import true_cost


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1_000), noise=st.floats(0.0, 0.1))
def test_the_step_time_model_learns_the_cost_despite_noise_and_outliers(seed: int, noise: float) -> None:
    rng = random.Random(seed)
    model = StepTimeModel()
    for step in range(400):
        load = StepLoad(rng.randint(1, 2_000), rng.randint(0, 100_000), rng.randint(0, 1_000_000))
        seconds = true_cost(load) * rng.uniform(1 - noise, 1 + noise)
        model.observe(load, seconds * (20 if step > 20 and rng.random() < 0.01 else 1))
    for load in (StepLoad(8, 4_000), StepLoad(512, 10_000, 100_000), StepLoad(2_000, 0, 900_000)):
        assert model.predict(load) == pytest.approx(true_cost(load), rel=0.25, abs=0.004)


@pytest.mark.parametrize("quiet_steps", [10, 250, 5_000])
def test_a_load_of_a_new_kind_is_learned_in_a_few_steps_after_a_long_quiet_time(quiet_steps: int) -> None:
    model = StepTimeModel()
    for step in range(quiet_steps):
        load = StepLoad(16, 16 * (60 + step))
        model.observe(load, true_cost(load))
    alone = StepLoad(16, 16 * (60 + quiet_steps))
    for chunk in range(20):
        load = StepLoad(16 + 200, alone.decode_context, 200 * (200 * chunk + 100))
        model.observe(load, true_cost(load))
    assert model.predict(load) == pytest.approx(true_cost(load), rel=0.05)
    assert model.predict(alone) == pytest.approx(true_cost(alone), rel=0.02)


def test_the_model_says_by_how_much_steps_with_prefills_outlast_their_prediction() -> None:
    rng = random.Random(3)
    model = StepTimeModel()
    for step in range(600):
        load = StepLoad(rng.randint(20, 500), rng.randint(0, 10_000), rng.randint(1, 100_000) * (step % 2))
        model.observe(load, true_cost(load) * rng.uniform(0.9, 1.1))
    assert 1.05 < model.prefill_overrun < 1.18
    for step in range(300):
        load = StepLoad(rng.randint(20, 500), rng.randint(0, 10_000), rng.randint(1, 100_000) * (step % 2))
        model.observe(load, true_cost(load))
    assert model.prefill_overrun < 1.03
    for step in range(300):
        load = StepLoad(rng.randint(20, 500), rng.randint(0, 10_000), rng.randint(1, 100_000) * (step % 2))
        model.observe(load, true_cost(load) * rng.uniform(0.2, 1.8))
    assert model.prefill_overrun == 1.4


def test_the_model_follows_a_machine_that_becomes_slower() -> None:
    rng = random.Random(0)
    model = StepTimeModel()
    for factor, steps in ((1.0, 200), (3.0, 600)):
        for _ in range(steps):
            load = StepLoad(rng.randint(1, 500), rng.randint(0, 10_000), rng.randint(0, 100_000))
            model.observe(load, factor * true_cost(load))
    assert model.predict(StepLoad(256)) == pytest.approx(3 * true_cost(StepLoad(256)), rel=0.2)


def test_chunks_are_cut_to_the_time_that_is_left() -> None:
    rng = random.Random(0)
    model = StepTimeModel()
    assert model.prefill_tokens_within(0.02, StepLoad(1), 0) is None
    for _ in range(300):
        load = StepLoad(rng.randint(1, 2_000), rng.randint(0, 50_000), rng.randint(0, 1_000_000))
        model.observe(load, true_cost(load))
    decode = StepLoad(8, 8_000)
    chunk = model.prefill_tokens_within(0.02, decode, 5_000)
    assert chunk is not None
    taken = true_cost(StepLoad(8 + chunk, 8_000, chunk * 5_000 + chunk * chunk // 2))
    assert taken == pytest.approx(0.02, rel=0.1)
    assert model.prefill_tokens_within(0.001, decode, 0) == 0
