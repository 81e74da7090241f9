"""Whatever a configuration says, the model loads or one of our own errors says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.tiny_checkpoints import SIZES, load, random_prompts, write_checkpoint
from octavo_engine.errors import OctavoError
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.models.registry import find_architecture
from octavo_engine.runner.interface import SequenceSlice

TINY = {**SIZES, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 1e-30, 1e30, -0.5, 0.5, 1 << 20, 1 << 40, 10**400]),
    st.integers(-10, 300),
    st.floats(allow_nan=True, allow_infinity=True),
)
VALUES = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=5), st.lists(NUMBERS, max_size=9), st.just({}))
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])},
    optional={
        "rope_theta": VALUES,
        "factor": VALUES,
        "low_freq_factor": VALUES,
        "high_freq_factor": VALUES,
        "original_max_position_embeddings": VALUES,
        "beta_fast": VALUES,
        "beta_slow": VALUES,
        "attention_factor": VALUES,
        "mscale": VALUES,
        "mscale_all_dim": VALUES,
        "truncate": VALUES,
        "partial_rotary_factor": VALUES,
        "short_factor": st.lists(NUMBERS, min_size=8, max_size=8),
        "long_factor": st.lists(NUMBERS, min_size=8, max_size=8),
    },
)
KEYS = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"),
    *("attention_bias", "mlp_bias", "eos_token_id", "architectures", "layer_types", "sliding_window"),
    *("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
    *("no_rope_layers", "query_pre_attn_scalar", "max_window_layers", "use_sliding_window", "sliding_window_pattern"),
    *("quantization_config", "rope_scaling", "final_logit_softcapping", "type_vocab_size", "layer_norm_eps"),
)
ARCHITECTURES = (
    *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3", "Phi3", "SmolLM3"),
    "GptOss",
)
LIES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    write_checkpoint(folder, hf.LlamaForCausalLM, hf.LlamaConfig(**TINY))
    return folder


@given(lies=LIES, rope=st.one_of(st.none(), ROPES))
@FEW
def test_a_fuzzed_llama_loads_or_is_refused(lies: dict[str, Any], rope: dict[str, Any] | None, honest: Path) -> None:
    config = json.loads((honest / "config.json").read_text())
    folder = honest / "fuzzed"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(honest / "model.safetensors")
    fuzzed = {**config, **lies} if rope is None else {**config, **lies, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(fuzzed))

    try:
        runner = load(folder, max_model_len=16, num_kv_blocks=8)
    except OctavoError:
        return

    if runner.info.task == "generate":
        assert torch.isfinite(runner.forward([SequenceSlice(random_prompts([7])[0], 0, [1, 2])])).all()


@given(name=st.sampled_from(ARCHITECTURES), lies=LIES, rope=st.one_of(st.none(), ROPES))
@FEW
def test_every_family_reads_a_fuzzed_configuration_or_refuses_it(
    name: str, lies: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    values = {**TINY, "architectures": [f"{name}ForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    fuzzed = {**values, **lies} if rope is None else {**values, **lies, "rope_parameters": rope}

    try:
        architecture, model = find_architecture(RawConfig(fuzzed, "fuzzed"))
        config = model.configure(RawConfig(fuzzed, "fuzzed"), architecture)
    except OctavoError:
        return

    assert 1 <= len(config.layers) <= 1024
    assert config.num_heads % config.num_kv_heads == 0
