"""Sequence classifiers and rerankers give the scores of transformers, in packed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from models.tiny_checkpoints import SIZES, load, random_prompts, write_checkpoint, write_tokenizer
from octavo_engine.errors import ConfigError

PROMPTS = random_prompts((9, 2, 31))
BERT = {**{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}, "num_attention_heads": 4}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66}
MODERN = {**BERT, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
Case = tuple[type, Callable[[], Any]]
CASES: dict[str, Case] = {
    "bert": (hf.BertForSequenceClassification, lambda: hf.BertConfig(**BERT, num_labels=1)),
    "roberta": (hf.RobertaForSequenceClassification, lambda: hf.RobertaConfig(**ROBERTA, num_labels=3)),
    "xlm-roberta": (hf.XLMRobertaForSequenceClassification, lambda: hf.XLMRobertaConfig(**ROBERTA, num_labels=1)),
    "modernbert": (hf.ModernBertForSequenceClassification, lambda: hf.ModernBertConfig(**MODERN, num_labels=4)),
    "modernbert, mean, biases": (
        hf.ModernBertForSequenceClassification,
        lambda: hf.ModernBertConfig(
            **MODERN,
            num_labels=1,
            classifier_pooling="mean",
            classifier_bias=True,
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "qwen3": (hf.Qwen3ForSequenceClassification, lambda: hf.Qwen3Config(**SIZES, num_labels=2)),
    "llama": (hf.LlamaForSequenceClassification, lambda: hf.LlamaConfig(**SIZES, num_labels=1)),
}


def _reference(model: torch.nn.Module, prompt: list[int], **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt]), **inputs).logits[0].float()


def _scores(logits: torch.Tensor) -> torch.Tensor:
    return logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, config = CASES[name]
    model = write_checkpoint(tmp_path, model_type, config())

    runner = load(tmp_path)

    assert runner.info.task == "classify"
    assert runner.info.labels == [f"LABEL_{i}" for i in range(model.config.num_labels)]
    expected = torch.stack([_scores(_reference(model, prompt)) for prompt in PROMPTS])
    torch.testing.assert_close(runner.embed(PROMPTS), expected, rtol=1e-4, atol=1e-5)


def test_the_second_text_of_a_pair_has_its_own_type(tmp_path: Path) -> None:
    model_type, config = CASES["bert"]
    model = write_checkpoint(tmp_path, model_type, config())
    starts = [4, 0, 20]

    found = load(tmp_path).embed(PROMPTS, starts)

    kinds = [[int(0 < start <= i) for i in range(len(prompt))] for prompt, start in zip(PROMPTS, starts, strict=True)]
    expected = [
        _scores(_reference(model, prompt, token_type_ids=torch.tensor([kind])))
        for prompt, kind in zip(PROMPTS, kinds, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], load(tmp_path).embed(PROMPTS)[0])


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            lambda x: x,
        ),
    ],
)
def test_the_activation_is_what_the_checkpoint_says(
    settings: dict[str, Any], activation: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path, hf.BertForSequenceClassification, hf.BertConfig(**BERT, **settings))

    found = load(tmp_path).embed(PROMPTS)

    expected = torch.stack([activation(_reference(model, prompt)) for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_labels_have_their_names(tmp_path: Path) -> None:
    config = hf.BertConfig(**BERT, id2label={0: "calm", 1: "angry"}, label2id={"calm": 0, "angry": 1})
    write_checkpoint(tmp_path, hf.BertForSequenceClassification, config)

    assert load(tmp_path).info.labels == ["calm", "angry"]


def test_a_language_model_judges_by_its_yes_and_no(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES))
    write_tokenizer(tmp_path, words=("yes", "no"))

    runner = load(tmp_path, task="classify")

    assert runner.info.judges_by_yes
    yes, no = 101, 102  # behind the printable characters
    logits = [_reference(model, prompt)[-1] for prompt in PROMPTS]
    expected = torch.stack([row[[no, yes]].softmax(-1)[1:] for row in logits])
    torch.testing.assert_close(runner.embed(PROMPTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "config", "task", "message"),
    [
        (hf.BertForSequenceClassification, hf.BertConfig(**BERT), "embed", "is a classifier; use task=classify"),
        (hf.BertModel, hf.BertConfig(**BERT), "classify", "has no head to classify with; use task=embed"),
    ],
)
def test_a_task_without_its_head_is_refused(
    model_type: type, config: Any, task: str, message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, model_type, config)

    with pytest.raises(ConfigError, match=message):
        load(tmp_path, task=task)
