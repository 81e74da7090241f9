"""What `octavo bench` sends, and when."""

from __future__ import annotations

import dataclasses

import pytest

from octavo_cli.bench import Load, arrivals, prompts

LOAD = Load(
    model="m", num_prompts=2_000, input_len=30, output_len=8, prefix_len=10, request_rate=50.0, burstiness=1.0,
    max_concurrency=None, seed=3, ignore_eos=True, chat=True, temperature=0.0,
)  # fmt: skip


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    texts = [text.split() for text in prompts(LOAD)]

    assert {len(words) for words in texts} == {30}
    assert len({tuple(words[:10]) for words in texts}) == 1
    assert len({tuple(words[10:]) for words in texts}) == len(texts)


def test_the_same_seed_gives_the_same_load() -> None:
    assert list(prompts(LOAD)) == list(prompts(LOAD))
    assert list(arrivals(LOAD)) == list(arrivals(LOAD))
    assert list(prompts(LOAD)) != list(prompts(dataclasses.replace(LOAD, seed=4)))


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0])
def test_arrivals_keep_their_mean_rate_whatever_the_burstiness(burstiness: float) -> None:
    times = list(arrivals(dataclasses.replace(LOAD, burstiness=burstiness, num_prompts=5_000)))

    assert times == sorted(times)
    assert times[-1] == pytest.approx(100.0, rel=0.1)


def test_an_infinite_rate_sends_everything_at_once() -> None:
    assert set(arrivals(dataclasses.replace(LOAD, request_rate=float("inf")))) == {0.0}
