"""Small random checkpoints written by transformers, and the same weights run through our paged runner."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo_engine.config import EngineConfig
from octavo_engine.loader.load import load_runner
from octavo_engine.runner.interface import ModelRunner, SequenceSlice

VOCAB = 131
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(path: Path, model_type: type, config: Any, seed: int = 0, **save: Any) -> torch.nn.Module:
    """A model with every weight random (norms and biases too), saved under `path` and returned in float32."""
    torch.manual_seed(seed)
    model = model_type(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(path, **save)
    return model


def write_tokenizer(folder: Path, words: Sequence[str] = ()) -> None:
    """A tokenizer of single printable characters, and these words, beside the checkpoint."""
    vocab = {"<unk>": 0} | {char: index + 1 for index, char in enumerate(string.printable)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_tokens(list(words))
    tokenizer.save(str(folder / "tokenizer.json"))


def load(path: Path, **settings: Any) -> ModelRunner:
    """Our runner over a checkpoint; float32, 64 blocks of 4 tokens unless told otherwise."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "num_kv_blocks": 64,
        "block_size": 4,
        "num_threads": 1,
    }
    return load_runner(EngineConfig(model=str(path), **(defaults | settings)), lambda _: None)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids without the special ones."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def reference_logits(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Transformers' logits of each prompt alone: [length, vocab_size] float32. Through eager attention: in some
    releases no other knows Gemma 2's soft cap."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [model(torch.tensor([list(prompt)])).logits[0].float() for prompt in prompts]


def paged_logits(runner: ModelRunner, prompts: Sequence[Sequence[int]], seed: int = 0) -> list[torch.Tensor]:
    """Logits at every position, computed in random chunks, in batches of random members, over scattered blocks."""
    rng = random.Random(seed)
    block_size = runner.info.kv_block_size
    blocks = list(range(runner.info.kv_blocks_total))
    rng.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(-(-len(prompt) // block_size))] for prompt in prompts]
    done = [0] * len(prompts)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    while unfinished := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        members = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        takes = [min(rng.choice((1, 1, 2, 5, 9)), len(prompts[i]) - done[i]) for i in members]
        slices = [
            SequenceSlice(prompts[i][done[i] : done[i] + n], done[i], tables[i], n)
            for i, n in zip(members, takes, strict=True)
        ]
        for i, logits in zip(members, runner.forward(slices).split(takes), strict=True):
            rows[i].append(logits)
            done[i] += len(logits)
    return [torch.cat(parts) for parts in rows]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
