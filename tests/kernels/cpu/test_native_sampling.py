"""The native sampler chooses the tokens that the reference chooses, with the same noise."""

from __future__ import annotations

import pytest
import torch

from octavo_engine.sampler.sampler import Sampler
from octavo_engine.sampler.state import SamplerState
from octavo_engine.sampling_params import SamplingParams
from octavo_kernels import ops
from octavo_kernels.reference import sampling as reference


def settings(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[torch.Tensor, ...]:
    floats = [torch.full((rows,), value) for value in (temperature, top_p, min_p)]
    limit = torch.full((rows,), top_k, dtype=torch.int32)
    return floats[0], limit, floats[1], floats[2], torch.arange(rows) * 2**33 - 5, torch.arange(rows) % 3


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 40.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1e-6},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 30.0, "top_k": 300, "top_p": 0.9},
        {"top_k": 100_000, "top_p": 0.95},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 17, 1_500, 9_001])
def test_draws_are_those_of_the_reference(isa: str, vocab: int, filters: dict[str, float]) -> None:
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(5, vocab)
    arguments = settings(5, **filters)  # type: ignore[arg-type]
    assert torch.equal(ops.sample(logits, *arguments), reference.sample(logits, *arguments))
    assert ops.sample.backend_for(logits, *arguments) == "cpu"


@pytest.mark.parametrize(
    ("spread", "filters"),
    [(0.01, {"top_p": 0.9}), (0.0, {"top_k": 5}), (0.0, {"top_p": 0.01}), (30.0, {"top_p": 0.9}), (100.0, {})],
    ids=["nearly flat", "all equal, top-k", "all equal, top-p", "peaked", "far apart"],
)
def test_any_spread_of_logits_matches(isa: str, spread: float, filters: dict[str, float]) -> None:
    torch.manual_seed(3)
    logits = spread * torch.randn(3, 4_000)
    arguments = settings(3, **filters)  # type: ignore[arg-type]
    assert torch.equal(ops.sample(logits, *arguments), reference.sample(logits, *arguments))


def test_rows_with_different_settings_do_not_mix(isa: str) -> None:
    torch.manual_seed(4)
    logits = torch.randn(5, 70)
    arguments = list(settings(5))
    arguments[0] = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0])
    arguments[1] = torch.tensor([0, 3, 0, 5, 70], dtype=torch.int32)
    arguments[2] = torch.tensor([1.0, 1.0, 0.6, 0.9, 0.1])
    together = ops.sample(logits, *arguments)
    assert torch.equal(together, reference.sample(logits, *arguments))
    alone = [ops.sample(logits[i : i + 1], *(x[i : i + 1] for x in arguments)) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_the_first_of_equal_logits_is_the_greedy_choice(isa: str) -> None:
    logits = torch.zeros(3, 5_000)
    logits[1, 4_321], logits[2, [1_024, 1_023, 4_999]] = 1.0, 2.0
    assert ops.sample(logits, *settings(3, temperature=0.0)).tolist() == [0, 4_321, 1_023]


def test_spoiled_rows_are_reported_and_excluded_tokens_never_drawn(isa: str) -> None:
    torch.manual_seed(5)
    logits = torch.randn(6, 40)
    logits[0, 3] = float("nan")
    logits[1, 39] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    logits[5, ::2] = float("-inf")
    for filters in ({}, {"top_k": 3, "top_p": 0.9}, {"top_p": 0.9999}):
        tokens = ops.sample(logits, *settings(6, **filters)).tolist()  # type: ignore[arg-type]
        assert tokens[:4] == [reference.NOT_FINITE, reference.NOT_FINITE, reference.ALL_EXCLUDED, 0]
        assert tokens[4] >= 0
        assert tokens[5] % 2 == 1


def test_frequencies_follow_the_softmax(isa: str) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, 4).contiguous()
    counts = torch.bincount(ops.sample(logits, *settings(20_000)), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.softmax(logits[0], 0), atol=0.015, rtol=0)


def test_the_engines_sampler_uses_it_and_a_neighbour_with_typical_p_changes_nothing(native: None) -> None:
    torch.manual_seed(6)
    logits = 2 * torch.randn(3, 300)
    params = [
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.0),
        SamplingParams(typical_p=0.5),
    ]
    states = [SamplerState(p, seed, [1, 2, 3], 2) for p, seed in zip(params, (5, 2**64 - 1, 2**63), strict=True)]
    together = Sampler().sample(logits.clone(), states).token_ids
    alone = [Sampler().sample(logits[i : i + 1].clone(), [states[i]]).token_ids[0] for i in range(3)]
    assert together == alone
    expected = ops.sample(
        logits[:1], *settings(1, temperature=0.8, top_p=0.9)[:4], torch.tensor([5]), torch.tensor([1])
    )
    assert together[0] == expected.item()
    assert together[1] == logits[1].argmax().item()
