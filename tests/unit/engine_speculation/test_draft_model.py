"""A draft model changes how many steps an answer takes, and never what is answered or how it is distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from fake_runner import SPECIAL, FakeRunner, logits_after
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import ConfigError
from octavo_engine.messages import AddRequest, SequenceOutput
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.speculation.draft_model import DraftModel


class SimilarRunner(FakeRunner):
    """A model that often agrees with the other one."""

    def __init__(self, difference: float, **settings: int) -> None:
        super().__init__(**{"num_blocks": 200, **settings})
        self._difference = difference

    def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(slices, sampled)
        logits = logits + self._difference * logits.flip(-1)
        logits[:, sorted(SPECIAL)] = -torch.inf  # a guess must not make the fake model misbehave
        return logits


def engine(draft: FakeRunner | None, num_speculative_tokens: int = 4, **settings: int) -> EngineCore:
    config = EngineConfig(
        model="fake",
        max_num_seqs=8,
        max_num_batched_tokens=128,
        num_speculative_tokens=num_speculative_tokens,
        speculative_model="" if draft is None else "draft",
    )
    return EngineCore(FakeRunner(**{"num_blocks": 200, **settings}), config, lambda: 0.0, draft=draft)


def run(core: EngineCore, requests: dict[str, SamplingParams], prompt: int = 3) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {name: [] for name in requests}
    waiting = list(requests.items())
    for _ in range(200_000):
        while waiting and core.scheduler.num_waiting < 8:
            name, sampling = waiting.pop()
            tokens_ = [int(name[1:]) % 80 + 1, *range(2, 1 + prompt)]
            core.add(AddRequest(request_id=name, prompt_token_ids=tokens_, sampling=sampling))
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs[output.request_id].append(output)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def crowd(count: int = 6, **sampling: object) -> dict[str, SamplingParams]:
    settings = {"max_tokens": 40, **sampling}
    return {f"r{i}": SamplingParams(**settings, seed=i) for i in range(count)}  # type: ignore[arg-type]


@pytest.mark.parametrize("difference", [0.0, 0.3, 3.0])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 0.5, "top_k": 3, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ],
)
def test_the_answer_is_the_same_token_for_token(sampling: dict[str, float], difference: float) -> None:
    plain = run(engine(None, 0), crowd(**sampling))
    draft = SimilarRunner(difference)
    guessing = engine(draft)
    guessed = run(guessing, crowd(**sampling))
    assert {name: tokens(out) for name, out in guessed.items()} == {name: tokens(out) for name, out in plain.items()}
    assert guessing.pool.num_used == 0
    assert drafts_of(guessing).pool.num_used == 0


def drafts_of(core: EngineCore) -> DraftModel:
    speculator = core.scheduler.speculator
    assert speculator is not None
    assert isinstance(speculator.proposer, DraftModel)
    return speculator.proposer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_that_agrees_saves_most_steps(temperature: float) -> None:
    core, plain = engine(SimilarRunner(0.0)), engine(None, 0)
    sampling = {"r1": SamplingParams(max_tokens=60, temperature=temperature, seed=3)}
    assert tokens(run(core, sampling)["r1"]) == tokens(run(plain, sampling)["r1"])
    stats = core.stats()
    assert stats.spec_accepted_tokens == stats.spec_draft_tokens > 40
    assert stats.step < plain.stats().step / 3
    by_position = [stats.spec_accepted_by_position[str(i)] for i in range(4)]
    assert by_position == sorted(by_position, reverse=True)
    assert sum(by_position) == stats.spec_accepted_tokens
    assert stats.spec_drafts == by_position[0]


def test_random_draws_agree_more_often_than_independent_ones_would() -> None:
    """Sharing random numbers accepts more than the chance that two independent draws are equal."""
    core = engine(SimilarRunner(0.1), num_speculative_tokens=1)
    run(core, crowd(40, temperature=1.0, max_tokens=8))
    stats = core.stats()
    independent = []
    for start in range(1, 41):
        logits = logits_after([start, 2, 3])
        p, q = logits.softmax(-1), (logits + 0.1 * logits.flip(-1)).softmax(-1)
        independent.append(float((p * q).sum()))
    assert stats.spec_accepted_tokens / stats.spec_draft_tokens > 1.5 * sum(independent) / len(independent)


def test_the_distribution_is_that_of_the_model_alone() -> None:
    """Second tokens of many seeds against their exact distribution: chi-squared, far below any sensible bound."""
    prompt, count = [5, 2, 3], 1_500
    core = engine(SimilarRunner(0.5), num_speculative_tokens=2, num_blocks=400)
    outputs = run(core, {f"r{4 + 80 * i}": SamplingParams(max_tokens=3, temperature=1.0, seed=i) for i in range(count)})
    assert core.stats().spec_accepted_tokens > 100
    first = logits_after(prompt).softmax(-1)
    exact = sum(
        first[token] * logits_after([*prompt, token]).softmax(-1) for token in range(len(first)) if first[token] > 1e-7
    )
    assert isinstance(exact, torch.Tensor)
    seen = Counter(tokens(out)[1] for out in outputs.values())
    likely = [token for token in range(len(first)) if exact[token] * count >= 8]
    rest = count - sum(seen[token] for token in likely)
    expected_rest = count * (1 - float(sum(exact[token] for token in likely)))
    chi = sum((seen[token] - count * float(exact[token])) ** 2 / (count * float(exact[token])) for token in likely)
    chi += (rest - expected_rest) ** 2 / max(1.0, expected_rest)
    degrees = len(likely)
    assert chi < degrees + 5 * (2 * degrees) ** 0.5


def test_a_draft_model_that_never_agrees_is_given_up() -> None:
    core = engine(SimilarRunner(50.0))
    run(core, {"r1": SamplingParams(max_tokens=120, temperature=0.0)})
    assert core.stats().spec_draft_tokens < 60


def test_new_sequences_start_from_what_others_taught() -> None:
    core = engine(SimilarRunner(50.0))
    run(core, crowd(16, temperature=0.0, max_tokens=12))
    before = core.stats().spec_draft_tokens
    run(core, {"r77": SamplingParams(max_tokens=30, temperature=0.0)})
    assert core.stats().spec_draft_tokens - before < 8


def test_long_prompts_are_caught_up_with_in_parts() -> None:
    draft = SimilarRunner(0.0, max_model_len=256)
    core = engine(draft)
    out = run(core, {"r1": SamplingParams(max_tokens=20, temperature=0.0)}, prompt=80)
    drafts = drafts_of(core)
    assert tokens(out["r1"]) == tokens(
        run(engine(None, 0), {"r1": SamplingParams(max_tokens=20, temperature=0.0)}, prompt=80)["r1"]
    )
    assert max(sum(len(piece.token_ids) for piece in batch) for batch in draft.batches) <= drafts._max_num_tokens


def test_without_memory_for_drafts_there_are_none() -> None:
    core = engine(SimilarRunner(0.0, num_blocks=2))
    out = run(core, crowd(4, temperature=0.0))
    assert tokens(out["r1"]) == tokens(run(engine(None, 0), crowd(4, temperature=0.0))["r1"])


def test_preempted_sequences_are_followed_again() -> None:
    core = engine(SimilarRunner(0.2), num_blocks=24)
    guessed = run(core, crowd(6, temperature=0.0, max_tokens=30))
    plain = run(engine(None, 0), crowd(6, temperature=0.0, max_tokens=30))
    assert {name: tokens(out) for name, out in guessed.items()} == {name: tokens(out) for name, out in plain.items()}
    assert core.scheduler.num_preemptions > 0
    assert drafts_of(core).pool.num_used == 0


def test_a_draft_model_that_breaks_ends_guessing_and_nothing_else() -> None:
    draft = SimilarRunner(0.0)
    core = engine(draft)
    draft.broken = True
    out = run(core, crowd(3, temperature=0.0))
    assert tokens(out["r1"]) == tokens(run(engine(None, 0), crowd(3, temperature=0.0))["r1"])
    assert "a kernel failed" in core.stats().spec_unavailable


def test_a_draft_model_needs_a_number_of_tokens() -> None:
    with pytest.raises(ConfigError, match="speculative_model: needs num_speculative_tokens"):
        EngineConfig(model="m", speculative_model="d").validate()


def test_a_draft_model_must_speak_the_same_tokens() -> None:
    other = FakeRunner(num_blocks=10)
    other._info["vocab_size"] = 50
    with pytest.raises(ConfigError, match="speculative_model: has 50 tokens, the model has 97"):
        engine(other)
