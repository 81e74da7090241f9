"""Guessing ahead changes how many steps an answer takes, and never the answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_runner import FakeRunner
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import AddRequest, FinishReason, SequenceOutput
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.speculation.ngram import NgramIndex

REPEATING = 1


def engine(num_speculative_tokens: int, memory: int | None = REPEATING, **runner: int) -> EngineCore:
    config = EngineConfig(
        model="fake", max_num_seqs=8, max_num_batched_tokens=128, num_speculative_tokens=num_speculative_tokens
    )
    return EngineCore(FakeRunner(memory=memory, **{"num_blocks": 200, **runner}), config, lambda: 0.0)


def run(core: EngineCore, requests: dict[str, SamplingParams]) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {name: [] for name in requests}
    for index, (name, sampling) in enumerate(requests.items()):
        core.add(AddRequest(request_id=name, prompt_token_ids=[index + 1, 2, 3], sampling=sampling))
    for _ in range(3_000):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs[output.request_id].append(output)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def crowd(**sampling: object) -> dict[str, SamplingParams]:
    settings_ = {"max_tokens": 60, **sampling}
    return {f"r{i}": SamplingParams(**settings_, seed=i) for i in range(6)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 0.5, "top_k": 3, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("memory", [REPEATING, 3, None])
def test_the_answer_is_the_same_token_for_token(sampling: dict[str, float], memory: int | None) -> None:
    plain = run(engine(0, memory), crowd(**sampling))
    guessing = engine(5, memory)
    guessed = run(guessing, crowd(**sampling))
    for name in plain:
        assert tokens(guessed[name]) == tokens(plain[name])
        wanted = [e.logprob for o in plain[name] for e in o.logprobs or []]
        assert [e.logprob for o in guessed[name] for e in o.logprobs or []] == pytest.approx(wanted, abs=1e-5)
    assert guessing.pool.num_used == 0


def test_a_repetitive_answer_takes_far_fewer_steps() -> None:
    plain, guessing = engine(0), engine(5)
    sampling = {"a": SamplingParams(max_tokens=120, temperature=0.0)}
    assert tokens(run(plain, sampling)["a"]) == tokens(run(guessing, sampling)["a"])
    assert guessing.stats().step < plain.stats().step / 3
    stats = guessing.stats()
    assert 0 < stats.spec_accepted_tokens <= stats.spec_draft_tokens


def test_memory_pressure_and_guessing_go_together() -> None:
    plain = run(engine(0), crowd(temperature=0.0, max_tokens=30))
    cramped = engine(5, num_blocks=24)
    guessed = run(cramped, crowd(temperature=0.0, max_tokens=30))
    assert {name: tokens(out) for name, out in guessed.items()} == {name: tokens(out) for name, out in plain.items()}
    assert cramped.scheduler.num_preemptions > 0
    assert cramped.pool.num_used == 0


def test_a_stop_token_among_accepted_guesses_ends_the_sequence_there() -> None:
    expected = tokens(run(engine(0), {"a": SamplingParams(max_tokens=120, temperature=0.0)})["a"])
    stop = expected[-1]
    sampling = SamplingParams(max_tokens=120, temperature=0.0, stop_token_ids=(stop,), min_tokens=0)
    core = engine(5)
    out = run(core, {"a": sampling})["a"]
    assert tokens(out) == expected[: expected.index(stop) + 1]
    assert out[-1].finish_reason is FinishReason.STOP
    assert core.pool.num_used == 0


def test_max_tokens_is_never_exceeded() -> None:
    for limit in range(1, 20):
        out = run(engine(7), {"a": SamplingParams(max_tokens=limit, temperature=0.0)})["a"]
        assert len(tokens(out)) == limit


def test_guesses_that_fail_are_given_up() -> None:
    core = engine(5, memory=None)
    prompt = [1, 2, 1, 2, 1, 3, 1, 2] * 20
    sampling = SamplingParams(max_tokens=80, temperature=0.0)
    core.add(AddRequest(request_id="a", prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        core.step()
    assert core.stats().spec_draft_tokens < 40


@settings(max_examples=80)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6))
def test_a_draft_is_what_followed_the_longest_latest_match(history: list[int], count: int) -> None:
    index = NgramIndex(2, 4)
    for length in range(1, len(history) + 1):
        tokens_ = history[:length]
        expected: list[int] = []
        for size in (4, 3, 2):
            ends = [end for end in range(size, length) if tokens_[end - size : end] == tokens_[-size:]]
            if ends and length > size:
                following = tokens_[ends[-1] :]
                expected = (following * count)[:count]
                break
        assert index.propose(tokens_, count) == expected
