"""Adapters of a model that is divided over processes answer as those of one that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from models.lora_adapters import write_adapter
from models.test_adapters import ALL, FAMILIES, LORA, mixed_logits
from models.tiny_checkpoints import SIZES, load, random_prompts, relative_error, write_checkpoint, write_tokenizer
from octavo_engine.errors import ModelLoadError
from octavo_engine.llm import LLM
from octavo_engine.sampling_params import SamplingParams

TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
PROMPTS = random_prompts([9, 20, 33, 14])
SLOTS = [0, 1, 2, None]


def compare(folder: Path, family: str, ranks: dict[str, int], **sizes: int) -> None:
    model_type, config_type, modules = FAMILIES[family]
    base = write_checkpoint(folder / "base", model_type, config_type(**(SIZES | sizes)))
    write_adapter(base, folder / "a", 1, target_modules=modules)
    write_adapter(base, folder / "b", 2, target_modules=modules[:2], r=8, lora_alpha=3)
    write_adapter(base, folder / "c", 3, target_modules=modules[2:], r=1, alpha_pattern={modules[2]: 5})
    alone, together = load(folder / "base", **LORA), load(folder / "base", **LORA, **ranks)
    for runner in (alone, together):
        for slot, name in enumerate("abc"):
            runner.place_adapter(slot, runner.read_adapter(name, folder / name, 8))

    expected = mixed_logits(alone, PROMPTS, SLOTS)
    found = mixed_logits(together, PROMPTS, SLOTS)

    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    plain = mixed_logits(together, PROMPTS, [None] * 4)
    assert all(relative_error(found[i], plain[i]) > 1e-2 for i in range(3)), "the adapters change nothing"


@pytest.mark.parametrize(("family", "ranks"), [("qwen2", TENSOR), ("llama", PIPELINE)])
def test_ranks_together_apply_the_adapters_of_one_process(tmp_path: Path, family: str, ranks: dict[str, int]) -> None:
    compare(tmp_path, family, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_family_can_be_divided(tmp_path: Path, family: str) -> None:
    compare(tmp_path, family, TENSOR)


@pytest.mark.slow
def test_four_ranks_share_the_rows_of_two_key_heads(tmp_path: Path) -> None:
    compare(tmp_path, "llama", {"tensor_parallel_size": 4}, num_attention_heads=8)


@pytest.mark.slow
def test_both_ways_at_once(tmp_path: Path) -> None:
    compare(tmp_path, "llama", TENSOR | PIPELINE)


def test_ranks_hold_parts_and_refuse_what_one_process_refuses(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    write_tokenizer(tmp_path / "base")
    write_adapter(base, tmp_path / "last", 1, target_modules=ALL, layers_to_transform=[SIZES["num_hidden_layers"] - 1])
    write_adapter(base, tmp_path / "high", 1, target_modules=ALL, r=16)
    settings = {**LORA, "lora_modules": {"last": str(tmp_path / "last")}, "num_kv_blocks": 64, "block_size": 4}
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    alone = LLM(str(tmp_path / "base"), dtype="float32", device="cpu", **settings)
    expected = [result.outputs[0].token_ids for result in alone.generate(PROMPTS, sampling, adapter="last")]

    together = LLM(str(tmp_path / "base"), dtype="float32", device="cpu", num_threads=1, **settings, **PIPELINE)

    results = together.generate(PROMPTS, sampling, adapter="last")
    assert [result.outputs[0].token_ids for result in results] == expected
    assert together.model.adapter_bytes < alone.model.adapter_bytes
    with pytest.raises(ModelLoadError, match="rank 16, allowed are 1 to 8"):
        load(tmp_path / "base", **LORA, **PIPELINE).read_adapter("high", tmp_path / "high", 8)
