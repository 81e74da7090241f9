"""A checkpoint whose configuration lies is one clear error, before anything large is allocated."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from models.tiny_checkpoints import SIZES, load, write_checkpoint
from octavo_engine.errors import ConfigError, ModelLoadError

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"architectures": None}, "architectures: none named: not supported; known are"),
    "unknown architecture": ({"architectures": ["EvilForCausalLM"]}, "architectures: EvilForCausalLM: not supported"),
    "architectures no list": ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of strings"),
    "hidden size missing": ({"hidden_size": None}, "hidden_size is missing"),
    "hidden size text": ({"hidden_size": "48"}, "hidden_size must be an integer from 1 to 16777216, got '48'"),
    "hidden size negative": ({"hidden_size": -1}, "hidden_size must be an integer"),
    "hidden size absurd": ({"hidden_size": 1 << 60}, "hidden_size must be an integer"),
    "wider than its tensors": ({"hidden_size": 96, "num_attention_heads": 6}, "has shape [131, 48], the configuration"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1024"),
    "more layers than tensors": ({"num_hidden_layers": 1000}, "'model.layers.3.input_layernorm.weight' is missing"),
    "fewer layers than tensors": ({"num_hidden_layers": 2}, "tensors have no place in this architecture"),
    "vocabulary absurd": ({"vocab_size": 1 << 24, "hidden_size": 1 << 23}, "is absurd"),
    "heads that do not divide": ({"num_key_value_heads": 4}, "num_key_value_heads must be a divisor"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1 to 4096"),
    "odd head": ({"head_dim": 15}, "head_dim must be even"),
    "norm not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1"),
    "unknown activation": ({"hidden_act": "eval"}, "hidden_act must be one of silu"),
    "unknown rope": ({"rope_parameters": {"rope_type": "evil"}}, "rope_type must be one of default"),
    "rope no object": ({"rope_parameters": 7}, "rope_parameters must be an object"),
    "rope factor zero": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "factor must be a number from 0.001 to",
    ),
    "rope theta negative": ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a number from 1.001"),
    "half a dimension turns": ({"rope_parameters": {"partial_rotary_factor": 0.01}}, "leaves 0 rotary dimensions"),
    "stop token text": ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    write_checkpoint(folder, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    (folder / "generation_config.json").unlink()
    return folder


def lying(honest: Path, folder: Path, **lies: Any) -> Path:
    (folder / "model.safetensors").symlink_to(honest / "model.safetensors")
    values = json.loads((honest / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **lies}))
    return folder


@pytest.mark.parametrize("name", LIES)
def test_a_lie_in_the_configuration_is_one_clear_error(name: str, honest: Path, tmp_path: Path) -> None:
    lies, message = LIES[name]

    with pytest.raises(ModelLoadError) as raised:
        load(lying(honest, tmp_path, **lies))

    assert message in str(raised.value)


def test_absurdly_many_positions_allocate_no_absurd_tables(honest: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    runner = load(lying(honest, tmp_path, max_position_embeddings=1 << 24))

    assert runner.info.max_model_len == 1 << 17
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


def test_a_weight_of_the_wrong_type_is_named(honest: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((honest / "config.json").read_text())
    tensors = load_file(honest / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int32)}, tmp_path / "model.safetensors")

    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has type torch\.int32"):
        load(tmp_path)


def test_more_positions_than_the_model_has_are_refused(honest: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len: 257 is beyond the 256 positions of the model"):
        load(honest, max_model_len=257)
