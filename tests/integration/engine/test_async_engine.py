"""A real model whose steps are launched ahead says what it says without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo_engine.llm import LLM, RequestOutput
from octavo_engine.sampling_params import SamplingParams, StructuredOutput

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The capital of Italy is",
]
SAMPLING = [
    SamplingParams(max_tokens=24, temperature=0.0, logprobs=3, prompt_logprobs=1),
    SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=7),
    SamplingParams(max_tokens=32, temperature=0.0, stop=["return"]),
    SamplingParams(max_tokens=24, temperature=0.7, seed=3, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(max_tokens=12, temperature=0.0, structured=StructuredOutput(choice=("Rome", "Paris", "Madrid"))),
]


def answers(path: Path, mode: str, device: str) -> list[RequestOutput]:
    llm = LLM(
        str(path), device=device, dtype="float32", num_kv_blocks=64, max_num_batched_tokens=24, max_num_seqs=8,
        async_scheduling=mode,
    )  # fmt: skip
    found = llm.generate(PROMPTS * 2, SAMPLING * 2)
    assert (llm.stats.steps_ahead > 10) == (mode == "on")
    assert llm.stats.kv_blocks_used == 0
    return found


def logprobs(result: RequestOutput) -> list[float]:
    entries = [*(result.prompt_logprobs or []), *(result.outputs[0].logprobs or [])]
    return [entry.logprob for entry in entries if entry is not None]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_answers_are_equal_for_every_kind_of_request(device: str, smollm2_gguf: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pairs = zip(answers(smollm2_gguf, "on", device), answers(smollm2_gguf, "off", device), strict=True)
    for ahead, plain in pairs:
        one, other = ahead.outputs[0], plain.outputs[0]
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        # Batches of another size add up in another order.
        assert logprobs(ahead) == pytest.approx(logprobs(plain), abs=1e-3)
