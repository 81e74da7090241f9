"""Adapters written by PEFT, mixed in one batch, against transformers with each adapter merged into the weights."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.lora_adapters import write_adapter
from models.smollm2_reference import load_reference
from models.tiny_checkpoints import SIZES, load, random_prompts, reference_logits, relative_error, write_checkpoint
from octavo_engine import LLM, SamplingParams
from octavo_engine.errors import ConfigError, ModelLoadError
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_kernels.registry import load_backend, use_backends

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, ALL),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, ALL),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, ALL),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, FUSED),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, ALL[:4]),
}
WIDE = SIZES | {"intermediate_size": 96}  # whole native steps take multiples of 32
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def mixed_logits(
    runner: TorchModelRunner, prompts: Sequence[Sequence[int]], slots: Sequence[int | None]
) -> list[torch.Tensor]:
    """Logits at every position: all sequences in one batch, in chunks of random length, each with its own adapter."""
    rng = random.Random(1)
    tables = [range(i * 16, (i + 1) * 16) for i in range(len(prompts))]
    done = [0] * len(prompts)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(n < len(prompt) for n, prompt in zip(done, prompts, strict=True)):
        members = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]
        takes = [min(rng.choice((1, 1, 3, 8)), len(prompts[i]) - done[i]) for i in members]
        slices = [
            SequenceSlice(prompts[i][done[i] : done[i] + n], done[i], tables[i], n, slots[i])
            for i, n in zip(members, takes, strict=True)
        ]
        for i, logits in zip(members, runner.forward(slices).split(takes), strict=True):
            rows[i].append(logits)
            done[i] += len(logits)
    return [torch.cat(parts) for parts in rows]


@pytest.mark.parametrize("backends", [("reference",), ("cpu", "reference")], ids=["reference", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_of_a_batch_gets_its_own_adapter(tmp_path: Path, family: str, backends: tuple[str, ...]) -> None:
    whole_step = "cpu" in backends and load_backend("cpu").available and family != "mixtral"
    with use_backends(*backends):
        check_mixed_batch(tmp_path, family, whole_step)


def check_mixed_batch(tmp_path: Path, family: str, whole_step: bool) -> None:
    model_type, config_type, modules = FAMILIES[family]
    base = write_checkpoint(tmp_path / "base", model_type, config_type(**WIDE))
    merged = [
        write_adapter(base, tmp_path / "a", 1, target_modules=modules),
        write_adapter(base, tmp_path / "b", 2, target_modules=modules[:2], r=8, lora_alpha=3, use_rslora=True),
        write_adapter(base, tmp_path / "c", 3, target_modules=modules[2:], r=1, alpha_pattern={modules[2]: 5}),
    ]
    runner = load(tmp_path / "base", **LORA)
    assert isinstance(runner, TorchModelRunner)
    assert (runner.compiled_step is not None) == whole_step
    assert (runner.info.adapter_bytes == 0) == whole_step  # it keeps the matrices itself, as they come
    for slot, name in enumerate("abc"):
        runner.place_adapter(slot, runner.read_adapter(name, tmp_path / name, 8))
    prompts = random_prompts([9, 20, 33, 14])

    found = mixed_logits(runner, prompts, [0, 1, 2, None])

    for prompt, logits, model in zip(prompts, found, [*merged, base], strict=True):
        assert relative_error(logits, reference_logits(model, [prompt])[0]) < 1e-4
    plain = reference_logits(base, prompts)
    assert all(relative_error(found[i], plain[i]) > 1e-2 for i in range(3)), "the adapters change nothing"
    alone = [mixed_logits(runner, [prompt], [slot])[0] for prompt, slot in zip(prompts, [0, 1, 2], strict=False)]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(alone, found, strict=False))


def test_a_slot_holds_nothing_of_the_adapter_before(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    write_adapter(base, tmp_path / "wide", 1, target_modules=ALL, r=8)
    merged = write_adapter(base, tmp_path / "narrow", 2, target_modules=["v_proj"], r=2)
    runner = load(tmp_path / "base", **LORA)
    for name in ("wide", "narrow"):
        runner.place_adapter(0, runner.read_adapter(name, tmp_path / name, 8))
    prompts = random_prompts([17])

    assert relative_error(mixed_logits(runner, prompts, [0])[0], reference_logits(merged, prompts)[0]) < 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama under `base` and a good adapter under `good`."""
    path = tmp_path_factory.mktemp("adapters")
    base = write_checkpoint(path / "base", transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    write_adapter(base, path / "good", 1, target_modules=ALL)
    return path


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> TorchModelRunner:
    return load(checkpoint / "base", **LORA)


def spoiled(checkpoint: Path, path: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A copy of the good adapter with changed options and tensors (None: left out)."""
    path.mkdir()
    options = json.loads((checkpoint / "good" / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(options))
    weights = load_file(checkpoint / "good" / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in weights.items() if v is not None}, path / "adapter_model.safetensors")
    return path


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("config", "tensors", "complaint"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
        ({"use_dora": True}, {}, "use_dora"),
        ({"bias": "all"}, {}, "bias"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"lora_alpha": "much"}, {}, "lora_alpha must be a number"),
        ({"lora_alpha": float("inf")}, {}, "lora_alpha must be a number"),
        ({"alpha_pattern": []}, {}, None),
        ({"alpha_pattern": [1]}, {}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+b": 2}}, {}, "alpha_pattern"),
        ({}, {f"{Q}A.weight": torch.zeros(4, 47)}, r"\[4, 47\], this model needs \[rank, 48\]"),
        ({}, {f"{Q}B.weight": torch.zeros(95, 4)}, r"needs \[96, rank\]"),
        ({}, {f"{Q}A.weight": torch.zeros(9, 48), f"{Q}B.weight": torch.zeros(96, 9)}, "rank 9, allowed are 1 to 8"),
        ({}, {f"{Q}A.weight": torch.zeros(0, 48)}, "rank 0"),
        ({}, {f"{Q}A.weight": torch.zeros(3, 48)}, "of one rank"),
        ({}, {f"{Q}A.weight": None}, "needs lora_A and lora_B"),
        ({}, {f"{Q}A.weight": torch.full((4, 48), float("nan"))}, "NaN"),
        ({}, {f"{Q}A.weight": torch.zeros(4, 48, dtype=torch.int32)}, "type torch.int32"),
        ({}, {Q.replace("layers.0", "layers.7") + "A.weight": torch.zeros(4, 48)}, "layers 0 to 2"),
        ({}, {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}, "no projection"),
        ({}, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 48)}, "no tensor of a plain LoRA"),
        ({}, {"base_model.model.x.lora_A.weight": torch.zeros(2_000_000)}, "are more than an adapter of rank 8"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(
    checkpoint: Path, runner: TorchModelRunner, tmp_path: Path, config: Any, tensors: Any, complaint: str | None
) -> None:
    path = spoiled(checkpoint, tmp_path / "bad", config, tensors)
    if complaint is None:
        assert runner.read_adapter("x", path, 8).rank == 4
        return
    with pytest.raises(ModelLoadError, match=complaint):
        runner.read_adapter("x", path, 8)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("adapter_config.json", b"{", "cannot be read as JSON"),
        ("adapter_config.json", b"[]", "must hold a JSON object"),
        ("adapter_model.safetensors", b"\xff" * 64, "no valid safetensors"),
        ("adapter_model.safetensors", b"", "no valid safetensors"),
        ("adapter_model.safetensors", None, "cannot be read"),
    ],
)
def test_broken_files_give_one_clear_error(
    checkpoint: Path, runner: TorchModelRunner, tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    path = spoiled(checkpoint, tmp_path / "bad", {}, {})
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=complaint):
        runner.read_adapter("x", path, 8)


def test_a_pickled_adapter_is_never_read(checkpoint: Path, runner: TorchModelRunner, tmp_path: Path) -> None:
    path = spoiled(checkpoint, tmp_path / "bad", {}, {})
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match="pickle"):
        runner.read_adapter("x", path, 8)


def test_adapters_need_a_model_that_generates(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    write_checkpoint(tmp_path, transformers.BertModel, config)
    with pytest.raises(ConfigError, match="enable_lora"):
        load(tmp_path, **LORA)


@pytest.mark.slow
def test_a_real_quantized_model_with_an_adapter_says_what_the_merged_one_says(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    """SmolLM2 in Q4_1 under two PEFT adapters and none, one batch on this machine's kernels, against transformers."""
    base = load_reference(smollm2_gguf)
    names = ("", "red", "blue")
    merged = {"": base}
    for seed, name in enumerate(names[1:]):
        merged[name] = write_adapter(base, tmp_path / name, seed, target_modules=ALL[1:4], r=8)
    llm = LLM(
        str(smollm2_gguf),
        dtype="float32",
        max_model_len=128,
        num_kv_blocks=32,
        num_threads=1,
        enable_lora=True,
        lora_modules={name: str(tmp_path / name) for name in names[1:]},
    )
    prompt = llm.tokenizer.encode("The capital of France is")
    with use_backends("cpu", "reference"):
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        results = llm.generate([prompt] * 6, sampling, adapter=[*names, *names])
    for name, result in zip([*names, *names], results, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(reference_logits(merged[name], [tokens])[0][-1].argmax()))
        assert result.outputs[0].token_ids == tokens[len(prompt) :]
