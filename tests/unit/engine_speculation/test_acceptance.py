"""How often guesses come true is known precisely while it stays, and anew soon after it changes."""

from __future__ import annotations

import random

import pytest

from octavo_engine.speculation.acceptance import Acceptance


def after(outcomes: list[bool], first: float = 0.7) -> Acceptance:
    acceptance = Acceptance(first, 2.0)
    for accepted in outcomes:
        acceptance.observe(accepted)
    return acceptance


@pytest.mark.parametrize("truth", [0.0, 0.05, 0.5, 0.9, 0.97, 1.0])
def test_what_stays_is_known_to_a_few_hundredths(truth: float) -> None:
    rng = random.Random(0)
    errors = [after([rng.random() < truth for _ in range(2_000)]).mean - truth for _ in range(50)]
    assert max(map(abs, errors)) < 0.13
    assert sum(error**2 for error in errors) / len(errors) < 0.04**2


@pytest.mark.parametrize(("before", "now"), [(0.0, 0.9), (0.9, 0.0), (0.3, 0.95)])
def test_what_changes_is_learned_within_some_tens_of_guesses(before: float, now: float) -> None:
    rng = random.Random(1)
    for _ in range(50):
        outcomes = [rng.random() < before for _ in range(2_000)] + [rng.random() < now for _ in range(60)]
        assert abs(after(outcomes).mean - now) < 0.2


def test_what_was_seen_seldom_might_be_better_than_it_looks() -> None:
    assert after([]).upper > after([True] * 7 + [False] * 3).upper > after([True, False] * 50, first=0.5).upper
    assert 0.5 < after([True, False] * 500, first=0.5).upper < 0.56
    assert after([False] * 1_000).upper < 0.02
    assert after([True] * 1_000).upper <= 1.0
