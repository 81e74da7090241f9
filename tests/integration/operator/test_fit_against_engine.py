"""The operator's estimate beside what Octavo's engine counts of the same checkpoint, weight by weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.config import EngineConfig
from octavo_engine.planning.measuring import measure
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.desired import plan_service
from octavo_operator.plan import Facts
from octavo_operator.plan.shape import shape_of
from octavo_operator.plan.values import ModelFacts

MIB = 1024**2
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, HEADS, KV_HEADS = 512, 1536, 8, 16_000, 8, 4


def write(folder: Path, *, tied: bool) -> dict[str, Any]:
    """A checkpoint of about 40 million weights; returns its config.json."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    tensors = {
        f"model.layers.{n}.{name}.weight": torch.ones(*size) for n in range(LAYERS) for name, size in shapes.items()
    }
    tensors |= {"model.embed_tokens.weight": torch.ones(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    if not tied:
        tensors["lm_head.weight"] = torch.ones(VOCABULARY, HIDDEN)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 2_048,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return config


def estimated(config: dict[str, Any], weight_bytes: int, quantization: str, longest: int) -> tuple[float, float]:
    """MiB of the weights and of the cache of one request, as the message tells them."""
    spec = {
        "model": {"storageUri": "hf://o/m", "maxModelLen": longest, "quantization": {"weights": quantization}},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "accelerator": {"minMemory": "80Gi"},
    }
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "m"},
        "spec": spec,
    }
    facts = Facts(model=ModelFacts(shape_of(config, weight_bytes)))
    fit = plan_service(parse(InferenceService, document), [], facts).fit
    assert fit is not None
    return fit.weight_bytes / MIB, fit.request_bytes / MIB


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quantization", ["None", "Int8", "Int4", "FP8"])
def test_weights_and_cache_are_within_three_percent_of_what_the_engine_counts(
    tmp_path: Path, tied: bool, quantization: str
) -> None:
    config = write(tmp_path, tied=tied)
    weights, request = estimated(config, (tmp_path / "model.safetensors").stat().st_size, quantization, 1_024)
    engine = EngineConfig(model=str(tmp_path), quantization=quantization.lower(), dtype="bfloat16", max_model_len=1_024)
    counted = measure(tmp_path, engine, torch.device("cuda"), elsewhere=True)
    assert weights == pytest.approx((counted.weight_bytes + counted.embedding_bytes) / MIB, rel=0.03)
    assert request == pytest.approx(counted.kv_bytes_per_token * 1_024 / MIB)
