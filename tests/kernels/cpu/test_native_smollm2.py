"""A real model on the native step: exact in float32, and how far int8 activations take it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.smollm2_reference import load_reference
from octavo_engine.config import EngineConfig
from octavo_engine.loader.load import load_runner
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_kernels.cpu.step import NativeStep

NEW_TOKENS = 10
QUESTIONS = ("What is the capital of France?", "Who wrote Hamlet?", "Why is the sky blue?", "What is 7 times 8?")
PROSE = """The water of the river was high that spring, and the farmers watched it from the dam every morning. When the
snow in the mountains melted, the stream would rise by a hand's width in a day, and nobody could say whether the wall
of stones would hold. They had built it together, forty years before, after the great flood had taken the mill and two
of the houses. Since then the children had learned to read the marks on the old bridge: below the third mark there was
nothing to fear, at the fourth the animals were led up the hill, and at the fifth everyone left. In the evening the old
miller told how the fifth mark had been reached only once, and how the bells had rung all night."""


def load(path: Path, dtype: str) -> TorchModelRunner:
    config = EngineConfig(model=str(path), dtype=dtype, max_model_len=512, num_kv_blocks=80)
    return load_runner(config, lambda progress: None)


def test_greedy_tokens_in_float32_equal_transformers(native: None, smollm2_gguf: Path) -> None:
    runner, tokenizer = load(smollm2_gguf, "float32"), load_tokenizer(smollm2_gguf)
    assert isinstance(runner.compiled_step, NativeStep)
    reference = load_reference(smollm2_gguf)
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        prompt = tokenizer.encode(text, add_special_tokens=False)
        answer: list[int] = []
        piece = SequenceSlice(prompt, 0, list(range(20)))
        for _ in range(NEW_TOKENS):
            answer.append(int(runner.forward([piece]).argmax()))
            piece = SequenceSlice(answer[-1:], len(prompt) + len(answer) - 1, piece.block_table)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


def test_int8_activations_keep_the_likelihood_of_prose(native: None, smollm2_gguf: Path) -> None:
    ids = load_tokenizer(smollm2_gguf).encode(PROSE)
    slices = [SequenceSlice(ids, 0, list(range(20)), len(ids))]
    exact, fast = (load(smollm2_gguf, dtype).forward(slices).log_softmax(-1)[:-1] for dtype in ("float32", "bfloat16"))
    following = torch.tensor(ids[1:]).unsqueeze(1)
    loss_exact, loss_fast = (-x.gather(1, following).mean().item() for x in (exact, fast))
    divergence = (exact.exp() * (exact - fast)).sum(-1).mean().item()
    assert loss_fast == pytest.approx(loss_exact, rel=0.01)
    assert divergence < 0.02
    assert (exact.argmax(-1) == fast.argmax(-1)).float().mean() > 0.9
