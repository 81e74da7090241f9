"""Sampling kernels against their references, which draw the same noise."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.reference import sampling as reference

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned")


def settings(rows, device, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    values = [torch.full((rows,), value, dtype=torch.float32, device=device) for value in (temperature, top_p, min_p)]
    temperatures, top_ps, min_ps = values
    top_ks = torch.full((rows,), top_k, dtype=torch.int32, device=device)
    seeds = torch.arange(rows, device=device) * 2**33 - 5
    counters = torch.arange(rows, device=device) % 3
    return temperatures, top_ks, top_ps, min_ps, seeds, counters


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
        {"top_k": 10_000, "top_p": 0.95},
    ],
    ids=str,
)
def test_draws_are_those_of_the_reference(device, filters):
    logits = 3 * torch.randn(4, 1500, device=device)
    arguments = settings(4, device, **filters)
    assert torch.equal(ops.sample(logits, *arguments), reference.sample(logits, *arguments))


@pytest.mark.parametrize(
    ("spread", "filters"),
    [
        (3.0, {"top_k": 50, "top_p": 0.9}),
        (3.0, {"top_p": 0.7}),
        (0.01, {"top_p": 0.9}),
        (1.0, {"top_k": 300}),
        (0.0, {"top_k": 5}),
        (0.0, {"top_p": 0.01}),
    ],
    ids=[
        "few candidates",
        "top-p alone",
        "a top-p beyond the candidates",
        "a large top-k",
        "all equal",
        "equal, top-p",
    ],
)
def test_large_vocabularies_with_and_without_candidates_match(device, spread, filters):
    logits = spread * torch.randn(2, 9000, device=device)
    arguments = settings(2, device, **filters)
    assert torch.equal(ops.sample(logits, *arguments), reference.sample(logits, *arguments))


def test_most_filtered_rows_are_answered_from_candidates(device):
    from octavo_kernels.triton.candidates import PENDING, sample_candidates

    logits = 3 * torch.randn(3, 9000, device=device)
    arguments = list(settings(3, device, top_k=40, top_p=0.9))
    arguments[1][1], arguments[2][1] = 0, 1.0  # no filter
    arguments[1][2] = 129
    out = torch.empty(3, dtype=torch.int64, device=device)
    sample_candidates(logits, *arguments, out)
    assert out[0] >= 0
    assert (out[1:] == PENDING.value).all()


def test_rows_with_different_settings_do_not_mix(device):
    logits = torch.randn(5, 70, device=device)
    arguments = list(settings(5, device))
    arguments[0] = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0], device=device)
    arguments[1] = torch.tensor([0, 3, 0, 5, 70], dtype=torch.int32, device=device)
    arguments[2] = torch.tensor([1.0, 1.0, 0.6, 0.9, 0.1], device=device)
    together = ops.sample(logits, *arguments)
    assert torch.equal(together, reference.sample(logits, *arguments))
    alone = [ops.sample(logits[i : i + 1], *(x[i : i + 1] for x in arguments)) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_equal_logits_are_kept_in_the_order_of_their_ids(device):
    logits = torch.zeros(1, 200, device=device)
    logits[0, 150] = 1.0
    for seed in range(6):
        arguments = list(settings(1, device, top_k=4))
        arguments[4] += seed
        assert ops.sample(logits, *arguments).item() in {0, 1, 2, 150}
        assert torch.equal(ops.sample(logits, *arguments), reference.sample(logits, *arguments))
        halved = list(settings(1, device, top_p=0.1))
        halved[4] += seed
        assert torch.equal(ops.sample(logits, *halved), reference.sample(logits, *halved))


def test_the_reference_draws_from_the_softmax(device):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], device=device).expand(20_000, 4).contiguous()
    counts = torch.bincount(reference.sample(logits, *settings(20_000, device)), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.softmax(logits[0], 0), atol=0.015, rtol=0)


def test_spoiled_rows_are_reported(device):
    logits = torch.randn(5, 40, device=device)
    logits[0, 3] = float("nan")
    logits[1, 5] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    tokens = ops.sample(logits, *settings(5, device, top_k=3, top_p=0.9))
    assert tokens[:4].tolist() == [reference.NOT_FINITE, reference.NOT_FINITE, reference.ALL_EXCLUDED, 0]
    assert tokens[4] >= 0


def test_penalties_match(device):
    rows, slots, vocab = 3, 5, 1100
    counts = torch.randint(0, 3, (slots, vocab), dtype=torch.int32, device=device)
    prompt = torch.randint(-(2**31), 2**31, (slots, -(-vocab // 32)), device=device).int()
    chosen = torch.tensor([4, 0, 2], device=device)
    penalties = [torch.rand(rows, device=device) + 0.5 for _ in range(3)]
    logits = torch.randn(rows, vocab, device=device)
    wanted = reference.apply_penalties(logits.clone(), counts, prompt, chosen, *penalties)
    actual = ops.apply_penalties(logits, counts, prompt, chosen, *penalties)
    assert actual is logits
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [31, 1056, 1500])
def test_grammar_masks_exclude_what_they_forbid(device, vocab):
    logits = torch.randn(2, vocab, device=device)
    bitmask = torch.randint(-(2**31), 2**31, (2, -(-vocab // 32)), device=device).int()
    wanted = reference.apply_bitmask(logits.clone(), bitmask)
    assert torch.equal(ops.apply_bitmask(logits, bitmask), wanted)


def test_logprobs_and_ranks_match(device):
    logits = 5 * torch.randn(4, 2500, device=device)
    logits[0, :100] = float("-inf")
    tokens = torch.tensor([2400, 0, 17, int(logits[3].argmax())], device=device)
    logprob, rank = ops.token_logprobs(logits, tokens)
    wanted_logprob, wanted_rank = reference.token_logprobs(logits, tokens)
    torch.testing.assert_close(logprob, wanted_logprob, rtol=1e-5, atol=1e-5)
    assert torch.equal(rank, wanted_rank)
    assert rank[3] == 1


@pytest.mark.parametrize("certain", [False, True])
def test_draft_verification_matches(device, certain):
    sequences, drafts, vocab = 6, 3, 40
    target = torch.softmax(2 * torch.randn(sequences, drafts + 1, vocab, device=device), -1)
    draft = None if certain else torch.softmax(torch.randn(sequences, drafts, vocab, device=device), -1)
    tokens = target[:, :drafts].argmax(-1)
    counts = torch.tensor([3, 3, 2, 1, 0, 3], dtype=torch.int32, device=device)
    seeds, counters = torch.arange(sequences, device=device) + 11, torch.arange(sequences, device=device)
    actual = ops.verify_drafts(target, draft, tokens, counts, seeds, counters)
    assert torch.equal(actual, reference.verify_drafts(target, draft, tokens, counts, seeds, counters))


def test_tokens_the_reference_verified_follow_the_target(device):
    count = 1000
    target = torch.tensor([0.1, 0.2, 0.7], device=device).expand(count, 2, 3).contiguous()
    draft = torch.tensor([0.6, 0.3, 0.1], device=device).expand(count, 1, 3).contiguous()
    seeds = torch.arange(count, device=device)
    tokens = reference.sample(draft[:, 0].log(), *settings(count, device)[:4], seeds + 10_000, seeds * 0).unsqueeze(1)
    out = reference.verify_drafts(target, draft, tokens, torch.ones(count, dtype=torch.int32), seeds, seeds * 0)
    frequency = torch.bincount(out[:, 0], minlength=3) / count
    torch.testing.assert_close(frequency, target[0, 0], atol=0.06, rtol=0)
