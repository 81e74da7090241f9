"""Tokens are chosen from the distribution a request asks for, whatever its neighbours ask for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from octavo_engine.sampler.argmax import row_max
from octavo_engine.sampler.filters import filtered_distribution, sample_rows
from octavo_engine.sampler.noise import request_seed, uniform
from octavo_engine.sampler.processors import process_row
from octavo_engine.sampler.sampler import ALL_EXCLUDED, NOT_FINITE, Sampler
from octavo_engine.sampler.state import SamplerState
from octavo_engine.sampling_params import SamplingParams

VOCAB = 1_536


def logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def state(tokens: list[int] | None = None, num_prompt: int = 0, seed: int = 1, **params: object) -> SamplerState:
    return SamplerState(SamplingParams(**params), seed, tokens or [], num_prompt, frozenset({7}))  # type: ignore[arg-type]


FILTERS = st.builds(
    lambda t, k, p, m, y: SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, typical_p=y),
    st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    st.sampled_from([0, 1, 5, 50, 700]),
    st.sampled_from([1.0, 0.1, 0.5, 0.9, 0.99]),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([1.0, 0.2, 0.9]),
)


@settings(max_examples=60, deadline=None)
@given(params=FILTERS, seed=st.integers(0, 99))
def test_the_filtered_distribution_is_that_of_transformers(params: SamplingParams, seed: int) -> None:
    raw = logits(seed=seed)
    expected = TemperatureLogitsWarper(params.temperature)(None, raw)
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1.0:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    if params.typical_p < 1.0:
        assume(not is_undecided(expected[0], params.typical_p))
        expected = TypicalLogitsWarper(params.typical_p)(None, expected)
    torch.testing.assert_close(
        filtered_distribution(raw, [params]), torch.softmax(expected, dim=-1), atol=2e-5, rtol=1e-3
    )


def is_undecided(row: torch.Tensor, mass: float) -> bool:
    """Where typical sampling cuts stand two tokens so alike that rounding decides which of them stays."""
    logprobs = torch.log_softmax(row.double(), dim=-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).nansum()
    typicality, order = (-logprobs - entropy).abs().sort()
    cut = int((probs[order].cumsum(-1) < mass).sum())
    return bool((typicality[max(0, cut - 1) : cut + 2].diff() < 1e-5).any())


@settings(max_examples=40, deadline=None)
@given(params=st.lists(FILTERS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_draw_lands_where_the_distribution_function_says(params: list[SamplingParams], seed: int) -> None:
    raw = logits(len(params), seed)
    draws = [uniform(seed, row) for row in range(len(params))]
    chosen = sample_rows(raw, params, draws)
    support = filtered_distribution(raw, params)
    assert all(support[row, token] > 0 for row, token in enumerate(chosen.tolist()))


@settings(max_examples=40, deadline=None)
@given(params=st.lists(FILTERS, min_size=2, max_size=5), seed=st.integers(0, 99))
def test_neighbours_do_not_change_a_rows_token(params: list[SamplingParams], seed: int) -> None:
    raw = logits(len(params), seed)
    draws = [uniform(seed, row) for row in range(len(params))]
    together = sample_rows(raw, params, draws).tolist()
    alone = [int(sample_rows(raw[i : i + 1], params[i : i + 1], draws[i : i + 1])) for i in range(len(params))]
    assert together == alone


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 1.5}])
def test_frequencies_follow_the_distribution(params: dict[str, float]) -> None:
    raw = logits(vocab=12)
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    draws = 4_000
    counts = Counter(
        sample_rows(raw.repeat(draws, 1), [sampling] * draws, [uniform(5, i) for i in range(draws)]).tolist()
    )
    expected = filtered_distribution(raw, [sampling])[0] * draws
    chi_square = sum((counts[token] - e) ** 2 / e for token, e in enumerate(expected.tolist()) if e > 0)
    assert all(counts[token] == 0 for token, e in enumerate(expected.tolist()) if e == 0)
    assert chi_square < 35  # 11 degrees of freedom: p < 0.0003


@pytest.mark.parametrize("vocab", [96, 128, 1_000, VOCAB])
def test_the_greatest_entry_is_found_first_of_equals_and_with_nan(vocab: int) -> None:
    raw = logits(6, vocab=vocab).round()
    raw[4, 70] = float("nan")
    raw[5] = float("-inf")
    values, indices = row_max(raw)
    expected = raw.max(dim=-1)
    assert torch.equal(values.nan_to_num(1e9), expected.values.nan_to_num(1e9))
    assert torch.equal(indices, expected.indices)


def test_a_wide_row_samples_by_blocks_with_the_right_frequencies() -> None:
    raw = torch.full((1, 256), -20.0)
    raw[0, [3, 64, 130, 255]] = torch.tensor([0.0, 1.0, 0.5, 1.5])
    draws = 4_000
    chosen = sample_rows(raw.repeat(draws, 1), [SamplingParams()] * draws, [uniform(9, i) for i in range(draws)])
    counts = Counter(chosen.tolist())
    for token, probability in enumerate(torch.softmax(raw[0], dim=-1).tolist()):
        assert counts[token] == pytest.approx(probability * draws, abs=5 * (probability * draws + 0.1) ** 0.5)


def test_uniform_numbers_are_spread_and_independent_of_order() -> None:
    values = torch.tensor([uniform(seed, index) for seed in range(50) for index in range(50)], dtype=torch.float64)
    histogram = torch.histc(values, bins=10, min=0.0, max=1.0)
    assert histogram.min() > 190
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
    assert len({request_seed(0, f"r{i}") for i in range(100)}) == 100


def test_greedy_and_random_rows_share_a_batch() -> None:
    raw = logits(3)
    states = [state(temperature=0.0), state(temperature=1.0), state(temperature=0.0)]
    sampled = Sampler().sample(raw.clone(), states)
    assert sampled.token_ids[0] == int(raw[0].argmax())
    assert sampled.token_ids[2] == int(raw[2].argmax())
    assert sampled.logprobs is None


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_sampler_chooses_as_a_new_one_whatever_batches_it_has_seen(data: st.DataObject) -> None:
    known = [state(seed=seed, temperature=t) for seed, t in ((1, 0.0), (1, 0.9), (2, 0.9), (3, 1.5))]
    sampler = Sampler()
    for step in range(4):
        batch = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
        raw = logits(len(batch), seed=step)
        assert sampler.sample(raw.clone(), batch).token_ids == Sampler().sample(raw.clone(), batch).token_ids


def test_a_row_of_nan_or_infinity_fails_alone() -> None:
    raw = logits(4)
    raw[1, 5] = float("nan")
    raw[2, 5] = float("inf")
    for temperature in (0.0, 1.0):
        chosen = Sampler().sample(raw.clone(), [state(temperature=temperature, top_p=0.9)] * 4).token_ids
        assert chosen[1:3] == [NOT_FINITE, NOT_FINITE]
        assert min(chosen[0], chosen[3]) >= 0


def test_excluding_every_token_is_reported() -> None:
    sampled = Sampler().sample(logits(), [state(allowed_token_ids=[3], bad_words_ids=[[3]])])
    assert sampled.token_ids == [ALL_EXCLUDED]


def test_repetition_penalty_is_that_of_transformers() -> None:
    raw = logits()
    tokens = [3, 4, 4, 900]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), raw.clone())
    row = raw[0].clone()
    process_row(row, state(tokens, num_prompt=2, repetition_penalty=1.7))
    torch.testing.assert_close(row, expected[0])


def test_presence_and_frequency_count_the_output_only() -> None:
    row = torch.zeros(VOCAB)
    growing = [3, 3, 4]
    penalised = state(growing, num_prompt=2, presence_penalty=0.5, frequency_penalty=0.25)
    process_row(row, penalised)
    assert (row[3].item(), row[4].item()) == (0.0, -0.75)
    growing.append(4)
    row.zero_()
    process_row(row, penalised)
    assert row[4].item() == -1.0


def test_bias_allowed_tokens_and_bad_words_edit_only_what_they_name() -> None:
    row = torch.zeros(VOCAB)
    process_row(row, state([1, 2, 3], num_prompt=1, logit_bias={4: 2.0}, bad_words_ids=[[2, 3, 9], [8], [5, 6]]))
    assert row[4].item() == 2.0
    assert torch.isinf(row).nonzero().flatten().tolist() == [8, 9]
    row.zero_()
    process_row(row, state(allowed_token_ids=[1, 4]))
    assert torch.isfinite(row).nonzero().flatten().tolist() == [1, 4]


def test_min_tokens_masks_every_ending() -> None:
    row = torch.zeros(VOCAB)
    process_row(row, state([1], num_prompt=1, min_tokens=1, stop_token_ids=(9,)))
    assert torch.isinf(row).nonzero().flatten().tolist() == [7, 9]


def test_logprobs_are_the_models_own_and_ranked() -> None:
    raw = logits(2)
    states = [state(temperature=0.0, logprobs=3, logit_bias={11: 100.0}), state(temperature=0.0)]
    sampled = Sampler().sample(raw.clone(), states)
    assert sampled.logprobs is not None
    entry = sampled.logprobs[0]
    assert entry is not None
    expected = torch.log_softmax(raw[0], dim=-1)
    assert sampled.token_ids[0] == entry.token_id == 11
    assert entry.logprob == pytest.approx(float(expected[11]), abs=1e-5)
    assert entry.rank == int((expected > expected[11]).sum()) + 1
    assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()
    assert sampled.logprobs[1] is None
