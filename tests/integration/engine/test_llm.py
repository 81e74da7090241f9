"""A real small model through `LLM`: batching, caching and preemption change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from octavo_engine.errors import InvalidRequestError
from octavo_engine.llm import LLM
from octavo_engine.messages import FinishReason
from octavo_engine.sampling_params import SamplingParams, StructuredOutput

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The largest planet is",
    "In 1969",
]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> LLM:
    return LLM(
        str(smollm2_gguf), dtype="float32", num_threads=1, num_kv_blocks=256, max_num_seqs=32, max_num_batched_tokens=64
    )


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[str, list[int]]:
    """Each prompt's tokens when nothing else runs."""
    return {prompt: llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS}


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.chat(conversation, SamplingParams(max_tokens=20, temperature=0.0))[0].outputs[0]
    assert "Paris" in answer.text
    assert answer.finish_reason is FinishReason.STOP


def test_32_concurrent_requests_equal_each_alone(llm: LLM, alone: dict[str, list[int]]) -> None:
    prompts = (PROMPTS * 6)[:32]
    results = llm.generate(prompts, GREEDY)
    assert [result.outputs[0].token_ids for result in results] == [alone[prompt] for prompt in prompts]
    assert llm.stats.kv_blocks_used == 0


def test_prompts_have_any_of_their_forms(llm: LLM, alone: dict[str, list[int]]) -> None:
    text, other = PROMPTS[:2]
    ids = llm.tokenizer.encode(text)
    one_or_several: list[Any] = [
        text,
        ids,
        tuple(ids),
        np.array(ids),
        {"prompt": text},
        {"prompt_token_ids": ids},
        [np.array(ids), other, {"prompt": text}],
    ]
    for prompts in one_or_several:
        first, *rest = llm.generate(prompts, GREEDY)
        assert first.outputs[0].token_ids == alone[text]
        assert first.prompt_token_ids == ids
        assert len(rest) == (2 if isinstance(prompts, list) and prompts is not ids else 0)


@pytest.mark.parametrize("prompts", [[None], [{"text": "x"}], [["a", "b"]], [[1.5]], [{}]])
def test_what_is_no_prompt_is_refused_by_name(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="a prompt is a text"):
        llm.generate(prompts, GREEDY)


def test_preempted_sequences_equal_undisturbed_ones(smollm2_gguf: Path, alone: dict[str, list[int]]) -> None:
    cramped = LLM(
        str(smollm2_gguf), dtype="float32", num_kv_blocks=12, block_size=4, max_num_seqs=8, enable_prefix_caching=False
    )
    results = cramped.generate(PROMPTS, GREEDY)
    assert cramped.stats.num_preemptions > 0
    assert [result.outputs[0].token_ids for result in results] == list(alone.values())


def test_a_cached_prefix_changes_nothing(llm: LLM) -> None:
    prompt = list(range(100, 180))
    first, second = (llm.generate(prompt, GREEDY)[0].outputs[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 64)
    assert first.token_ids == second.token_ids


def test_a_seed_reproduces_in_a_crowd(llm: LLM) -> None:
    seeded = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9, seed=11)
    alone = llm.generate(PROMPTS[1], seeded)[0].outputs[0].token_ids
    others = [SamplingParams(max_tokens=10, temperature=1.0)] * 5
    crowd = llm.generate(PROMPTS, [others[0], seeded, *others[1:]])
    assert crowd[1].outputs[0].token_ids == alone


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    text = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text
    stop = text.strip()[3:6]
    result = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=0.0, stop=(stop,)))[0].outputs[0]
    assert result.text == text[: text.index(stop)]
    assert result.stop_reason == stop


def test_n_completions_share_the_prompt(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=5, temperature=1.0, n=3, seed=5, prompt_logprobs=0)
    result = llm.generate(PROMPTS[0], sampling)[0]
    assert [completion.index for completion in result.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in result.outputs}) > 1
    assert result.prompt_logprobs is not None


def test_an_impossible_prompt_is_refused_before_anything_runs(llm: LLM) -> None:
    before = llm.stats.step
    with pytest.raises(InvalidRequestError, match="at most"):
        llm.generate(["fine", [1] * 10_000], GREEDY)
    assert llm.stats.step == before


def test_a_small_model_answers_in_the_schema_it_is_given(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "population": {"type": "integer"}},
        "required": ["city", "population"],
        "additionalProperties": False,
    }
    conversation = [{"role": "user", "content": "Name a city and its population as JSON."}]
    structured = StructuredOutput(json_schema=json.dumps(schema))
    sampling = SamplingParams(max_tokens=60, temperature=0.0, structured=structured)
    answer = llm.chat(conversation, sampling)[0].outputs[0]
    assert answer.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(answer.text), schema)


def test_guessing_ahead_gives_the_same_text_in_fewer_steps(llm: LLM, smollm2_gguf: Path) -> None:
    guessing = LLM(str(smollm2_gguf), dtype="float32", num_threads=1, num_kv_blocks=64, num_speculative_tokens=4)
    prompt = "one two three four five six seven, " * 6
    sampling = SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True)
    before = llm.stats.step
    plain = llm.generate([prompt], sampling)[0].outputs[0]
    guessed = guessing.generate([prompt], sampling)[0].outputs[0]
    assert guessed.token_ids == plain.token_ids
    assert guessing.stats.spec_accepted_tokens > 0
    assert guessing.stats.step < llm.stats.step - before


def test_a_draft_that_is_the_model_itself_guesses_every_token_right(llm: LLM, smollm2_gguf: Path) -> None:
    """Greedy, in float32: whatever is guessed, however often that pays, is what the model chooses."""
    model = str(smollm2_gguf)
    guessing = LLM(
        model, speculative_model=model, dtype="float32", num_threads=1, num_kv_blocks=64, num_speculative_tokens=4
    )
    prompts = ["The three largest cities of France are", "Once upon a time, a fox"]
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain, guessed = llm.generate(prompts, sampling), guessing.generate(prompts, sampling)
    assert [found.outputs[0].token_ids for found in guessed] == [found.outputs[0].token_ids for found in plain]
    stats = guessing.stats
    assert stats.spec_accepted_tokens == stats.spec_draft_tokens > 0
    assert stats.step < 2 * 40
