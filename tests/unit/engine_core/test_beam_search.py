"""Beam search finds what an exhaustive search by the same rule finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from char_tokenizer import CharTokenizer
from fake_runner import EOS, FakeRunner, logits_after
from octavo_engine.beam_search import BeamSearchParams
from octavo_engine.errors import InvalidRequestError
from octavo_engine.llm import LLM
from octavo_engine.messages import FinishReason

PROMPT = [1, 2, 3]


@pytest.fixture
def llm() -> LLM:
    return LLM(
        "fake", load=lambda _config, _progress: FakeRunner(num_blocks=200), tokenizer=CharTokenizer(), block_size=4
    )


def logprob(tokens: tuple[int, ...]) -> float:
    total = 0.0
    for length, token in enumerate(tokens):
        total += float(torch.log_softmax(logits_after([*PROMPT, *tokens[:length]]), dim=-1)[token])
    return total


def test_one_beam_is_greedy(llm: LLM) -> None:
    beam = llm.beam_search(PROMPT, BeamSearchParams(beam_width=1, max_tokens=6))[0].outputs[0]
    greedy = []
    for _ in range(6):
        greedy.append(int(logits_after([*PROMPT, *greedy]).argmax()))
    assert beam.token_ids == greedy
    assert beam.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("width", [2, 4])
def test_two_steps_are_an_exhaustive_search_over_the_first_beams(llm: LLM, width: int) -> None:
    outputs = llm.beam_search(PROMPT, BeamSearchParams(beam_width=width, max_tokens=2))[0].outputs
    first = torch.log_softmax(logits_after(PROMPT), dim=-1).topk(width).indices.tolist()
    pairs = sorted(itertools.product(first, range(90)), key=logprob, reverse=True)[:width]
    assert [tuple(output.token_ids) for output in outputs] == pairs
    assert [output.cumulative_logprob for output in outputs] == pytest.approx(
        [logprob(pair) for pair in pairs], abs=1e-4
    )


def test_more_beams_never_score_worse(llm: LLM) -> None:
    best = [
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=width, max_tokens=5))[0].outputs[0].cumulative_logprob
        for width in (1, 8)
    ]
    assert best[1] >= best[0]


def test_a_beam_ends_at_eos() -> None:
    class Ending(FakeRunner):
        def forward(self, slices, sampled=None):  # type: ignore[no-untyped-def]
            logits = super().forward(slices, sampled)
            logits[:, EOS] = logits.amax(dim=-1) + 3.0
            return logits

    llm = LLM("fake", load=lambda _config, _progress: Ending(), tokenizer=CharTokenizer(), block_size=4)
    beam = llm.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=5))[0].outputs[0]
    assert beam.token_ids == [EOS]
    assert beam.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("fields", [{"beam_width": 0}, {"beam_width": 11}, {"beam_width": 2, "max_tokens": 0}])
def test_impossible_settings_are_refused(llm: LLM, fields: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=r"beam_width|max_tokens"):
        llm.beam_search(PROMPT, BeamSearchParams(**{"max_tokens": 3, **fields}))
