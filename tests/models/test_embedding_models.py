"""Encoders and embedding decoders give the vectors of transformers, in packed batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional

from models.tiny_checkpoints import SIZES, load, random_prompts, write_checkpoint
from octavo_engine.errors import ConfigError, InvalidRequestError

BERT = {**{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}, "num_attention_heads": 4}
ENCODERS: dict[str, tuple[type, Callable[[], Any]]] = {
    "bert": (hf.BertModel, lambda: hf.BertConfig(**BERT)),
    "bert below a head": (hf.BertForMaskedLM, lambda: hf.BertConfig(**BERT)),
    "roberta": (
        hf.RobertaModel,
        lambda: hf.RobertaConfig(**{**BERT, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66}),
    ),
}
POOLING_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
]


def write_modules(folder: Path, method: str, *, normalize: bool = True) -> None:
    """The files sentence-transformers puts beside a checkpoint."""
    (folder / "modules.json").write_text(json.dumps(MODULES if normalize else MODULES[:2]))
    (folder / "1_Pooling").mkdir()
    flags = {flag: name == method for name, flag in POOLING_FLAGS.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))


def hidden_states(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    base = getattr(model, model.base_model_prefix, model)
    with torch.inference_mode():
        return base(torch.tensor([prompt])).last_hidden_state[0]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_pool_the_mean_of_their_tokens(name: str, tmp_path: Path) -> None:
    model_type, config = ENCODERS[name]
    model = write_checkpoint(tmp_path, model_type, config())
    prompts = random_prompts((5, 1, 30))

    found = load(tmp_path).embed(prompts)

    expected = torch.stack([functional.normalize(hidden_states(model, p).mean(0), dim=0) for p in prompts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", list(POOLING_FLAGS))
def test_pooling_is_what_the_checkpoint_says(method: str, normalize: bool, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, hf.Qwen3Model, hf.Qwen3Config(**SIZES))
    write_modules(tmp_path, method, normalize=normalize)
    prompts = random_prompts((9, 4))

    runner = load(tmp_path)

    assert runner.info.task == "embed"
    pool = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "last": lambda h: h[-1]}[method]
    expected = torch.stack([pool(hidden_states(model, p)) for p in prompts])
    expected = functional.normalize(expected, dim=-1) if normalize else expected
    torch.testing.assert_close(runner.embed(prompts), expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_without_pooling_settings_takes_its_last_token(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES))
    prompts = random_prompts((9, 4))

    found = load(tmp_path, task="embed").embed(prompts)

    expected = torch.stack([functional.normalize(hidden_states(model, p)[-1], dim=0) for p in prompts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_refuses_to_generate(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.BertModel, hf.BertConfig(**BERT))

    with pytest.raises(ConfigError, match="is an embedding model; use task=embed"):
        load(tmp_path, task="generate")


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.BertModel, hf.BertConfig(**BERT))

    with pytest.raises(InvalidRequestError, match="at least one token"):
        load(tmp_path).embed([[5, 6], []])
