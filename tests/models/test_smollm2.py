"""The real SmolLM2-135M-Instruct says token for token what transformers says with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.smollm2_reference import load_reference
from models.tiny_checkpoints import load
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.tokenizer.load import load_tokenizer

NEW_TOKENS = 12
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "How many legs does a spider have?",
    "Write one line of Python that prints hello.",
    "Who wrote Hamlet?",
    "Translate 'good morning' to Spanish.",
    "What is 7 times 8?",
    "Give me a synonym for happy.",
    "Why is the sky blue?",
    "What do bees make?",
    "List the planets of the solar system.",
    "What is photosynthesis?",
    "Tell me a short joke.",
    "How do I boil an egg?",
    "What is the largest ocean?",
    "Define gravity in one sentence.",
    "What language is spoken in Brazil?",
    "When did the Second World War end?",
    "What is the opposite of cold?",
    "Suggest a name for a cat.",
)


@pytest.fixture(scope="module")
def runner(smollm2_gguf: Path) -> TorchModelRunner:
    return load(smollm2_gguf, num_kv_blocks=120, block_size=16, max_model_len=512)


@pytest.fixture(scope="module")
def prompts(smollm2_gguf: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(smollm2_gguf)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.fixture(scope="module")
def greedy(runner: TorchModelRunner, prompts: list[list[int]]) -> list[list[int]]:
    """Twenty answers decoded together."""
    return _decode_together(runner, prompts)


def test_greedy_tokens_of_twenty_prompts_equal_transformers(
    smollm2_gguf: Path, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    reference = load_reference(smollm2_gguf)

    for prompt, answer in zip(prompts, greedy, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


def test_it_knows_the_capital_of_france(smollm2_gguf: Path, greedy: list[list[int]]) -> None:
    assert "Paris" in load_tokenizer(smollm2_gguf).decode(greedy[0])


def test_a_prompt_decoded_alone_gives_the_same_tokens(
    runner: TorchModelRunner, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    for index in (0, 7, 13):
        assert _decode_together(runner, [prompts[index]]) == [greedy[index]]


def test_a_prompt_prefilled_in_chunks_gives_the_logits_of_the_whole(
    runner: TorchModelRunner, prompts: list[list[int]]
) -> None:
    prompt, table = prompts[10], [9, 2, 30, 4]
    whole = runner.forward([SequenceSlice(prompt, 0, table)])

    for start in range(0, len(prompt), 11):
        chunk = prompt[start : start + 11]
        logits = runner.forward([SequenceSlice(chunk, start, table)])

    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-3)


def test_copied_blocks_continue_a_sequence(runner: TorchModelRunner, prompts: list[list[int]]) -> None:
    prompt, table, copy = prompts[3], [11, 5, 40], [21, 25, 60]
    runner.forward([SequenceSlice(prompt[:-1], 0, table, 0)])
    expected = runner.forward([SequenceSlice(prompt[-1:], len(prompt) - 1, table)])

    runner.copy_blocks(list(zip(table, copy, strict=True)))
    found = runner.forward([SequenceSlice(prompt[-1:], len(prompt) - 1, copy)])

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_what_was_loaded_is_reported(runner: TorchModelRunner) -> None:
    info = runner.info

    assert info.architecture == "LlamaForCausalLM"
    assert (info.vocab_size, info.hidden_size, info.num_parameters) == (49_152, 576, 134_515_008)
    assert info.kv_blocks_total == 120
    assert info.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4
    assert list(info.phase_seconds) == ["resolve", "weights", "kv_cache", "warmup"]
    assert info.eos_token_ids == [2]


def _decode_together(runner: TorchModelRunner, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy continuations, all sequences in one batch."""
    blocks = iter(range(runner.info.kv_blocks_total))
    tables = [[next(blocks) for _ in range(-(-(len(p) + NEW_TOKENS) // 16))] for p in prompts]
    slices = [SequenceSlice(p, 0, table) for p, table in zip(prompts, tables, strict=True)]
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        chosen = runner.forward(slices).argmax(-1).tolist()
        for answer, token in zip(answers, chosen, strict=True):
            answer.append(token)
        slices = [
            SequenceSlice([a[-1]], len(p) + len(a) - 1, t) for p, a, t in zip(prompts, answers, tables, strict=True)
        ]
    return answers
