"""Whether models fit, beside what their checkpoints and data sheets say; and what old accelerators cannot compute."""

from __future__ import annotations

from typing import Any

import pytest

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.desired import plan_service
from octavo_operator.plan import Facts, Plan, Unplannable
from octavo_operator.plan.accelerators import find_product
from octavo_operator.plan.shape import ModelShape, shape_of
from octavo_operator.plan.values import ModelFacts

GIB = 1024**3
# What config.json and the sizes of the files say of published checkpoints.
LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B_BYTES = 16_060_556_376
LLAMA_70B = {**LLAMA_8B, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
             "num_attention_heads": 64}  # fmt: skip
LLAMA_70B_BYTES = 141_107_497_872
SMOLLM2 = {
    "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def shape(config: dict[str, Any], weight_bytes: int) -> ModelShape:
    found = shape_of(config, weight_bytes)
    assert found is not None
    return found


def planned(stored: ModelShape | None, **spec: Any) -> Plan:
    spec.setdefault("resources", {"limits": {"nvidia.com/gpu": 1}})
    spec.setdefault("model", {})
    spec["model"] = {"storageUri": "hf://org/model", **spec["model"]}
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat"},
        "spec": spec,
    }
    return plan_service(parse(InferenceService, document), [], Facts(model=ModelFacts(stored)))


def gpu(kind: str) -> dict[str, Any]:
    return {"accelerator": {"type": kind}, "runtime": {"name": "vllm"}}


def test_the_cache_of_a_token_is_what_the_architecture_says() -> None:
    assert shape(LLAMA_8B, 1).kv_elements * 2 * 32 == 131_072, "128 KiB a token"
    assert shape(DEEPSEEK_V3, 1).kv_elements == 576, "one compressed vector for all heads"
    assert shape({"text_config": LLAMA_8B}, 1) == shape(LLAMA_8B, 1), "models of several kinds nest it"


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": 0, "hidden_size": 8}, {"vocab_size": "many"}, {"a": 1}])
def test_what_is_no_transformer_has_no_shape(config: dict[str, Any]) -> None:
    assert shape_of(config, 1) is None


FITTING = {
    "8B at 16k on an H100": (LLAMA_8B, LLAMA_8B_BYTES, gpu("NVIDIA-H100-80GB-HBM3"), 16_384, True),
    "8B at 16k on a T4-sized card": (LLAMA_8B, LLAMA_8B_BYTES, {"accelerator": {"minMemory": "16Gi"}}, 16_384, False),
    "8B at 16k on an L4": (LLAMA_8B, LLAMA_8B_BYTES, gpu("NVIDIA-L4"), 16_384, True),
    "8B at 128k on an L4": (LLAMA_8B, LLAMA_8B_BYTES, gpu("NVIDIA-L4"), 131_072, False),
    "70B on one H100": (LLAMA_70B, LLAMA_70B_BYTES, gpu("NVIDIA-H100-80GB-HBM3"), 8_192, False),
    "70B on one H200": (LLAMA_70B, LLAMA_70B_BYTES, gpu("NVIDIA-H200"), 8_192, False),
}


@pytest.mark.parametrize(("config", "size", "spec", "longest", "fits"), FITTING.values(), ids=FITTING)
def test_known_models_on_known_accelerators(
    config: dict[str, Any], size: int, spec: dict[str, Any], longest: int, fits: bool
) -> None:
    fit = planned(shape(config, size), **spec, model={"maxModelLen": longest}).fit
    assert fit is not None
    assert fit.fits is fits, fit.message
    assert "weights" in fit.message


def test_what_does_not_fit_is_told_with_changes_that_make_it_fit() -> None:
    fit = planned(shape(LLAMA_8B, LLAMA_8B_BYTES), **gpu("NVIDIA-L4"), model={"maxModelLen": 131_072}).fit
    assert fit is not None
    first, *_ = fit.message.split(";")
    assert first.startswith("needs ")
    assert "of 22.1Gi usable" in fit.message
    assert fit.message.count("set spec.") == 2
    shorter = int(fit.message.split("maxModelLen: ")[1].split(";")[0].split()[0])
    again = planned(shape(LLAMA_8B, LLAMA_8B_BYTES), **gpu("NVIDIA-L4"), model={"maxModelLen": shorter}).fit
    assert again is not None
    assert again.fits, "following the advice helps"


def test_tensor_parallelism_and_quantization_make_room() -> None:
    large = shape(LLAMA_70B, LLAMA_70B_BYTES)
    four = gpu("NVIDIA-H100-80GB-HBM3") | {"parallelism": {"tensor": 4}, "resources": {"limits": {"nvidia.com/gpu": 4}}}
    fit = planned(large, **four, model={"maxModelLen": 8_192}).fit
    assert fit is not None
    assert fit.fits
    int4 = gpu("NVIDIA-H100-80GB-HBM3") | {"model": {"maxModelLen": 8_192, "quantization": {"weights": "Int4"}}}
    fit = planned(large, **int4).fit
    assert fit is not None
    assert fit.fits


def test_on_a_cpu_the_memory_limit_counts() -> None:
    small = shape(SMOLLM2, 269_060_552)
    fit = planned(small, resources={"limits": {"cpu": 2, "memory": "4Gi"}}).fit
    assert fit is not None
    assert fit.fits
    fit = planned(small, resources={"limits": {"cpu": 2, "memory": "512Mi"}}).fit
    assert fit is not None
    assert not fit.fits


def test_without_numbers_nothing_is_claimed_and_the_missing_one_is_named() -> None:
    assert planned(None).fit is None
    assert planned(None).not_estimated == "the model's shape is not known"
    known = shape(LLAMA_8B, LLAMA_8B_BYTES)
    assert "spec.accelerator.minMemory" in planned(known).not_estimated
    assert "limits.memory" in planned(known, resources={"limits": {"cpu": 2}}).not_estimated


@pytest.mark.parametrize(
    ("label", "name", "memory"),
    [
        ("NVIDIA-A100-SXM4-80GB", "A100", 80),
        ("NVIDIA-A100-PCIE-40GB", "A100", 40),
        ("NVIDIA-H100-NVL", "H100-NVL", 94),
        ("NVIDIA-H200", "H200", 141),
        ("NVIDIA-H20", "H20", 96),
        ("NVIDIA-L40S", "L40S", 48),
        ("NVIDIA-L4", "L4", 24),
        ("Tesla-T4", "T4", 16),
        ("Tesla-V100-SXM2-32GB", "V100", 32),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-ADA", 48),
        ("NVIDIA-RTX-A6000", "A6000", 48),
    ],
)
def test_products_are_found_in_the_labels_of_nodes(label: str, name: str, memory: int) -> None:
    product = find_product(label)
    assert product is not None
    assert (product.name, product.memory_gib) == (name, memory)


def test_an_unknown_product_is_not_judged() -> None:
    assert find_product("AMD-Instinct-MI300X") is None
    planned(None, **gpu("AMD-Instinct-MI300X"), model={"quantization": {"kvCache": "FP8"}})


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (gpu("NVIDIA-A100-SXM4-80GB") | {"model": {"quantization": {"kvCache": "FP8"}}}, "model.quantization.kvCache"),
        (gpu("Tesla-T4") | {"model": {"dtype": "BFloat16"}}, "model.dtype"),
        (gpu("Tesla-T4") | {"model": {"quantization": {"weights": "FP8"}}}, "model.quantization.weights"),
        ({"accelerator": {"type": "Tesla-T4"}, "runtime": {"name": "octavo"}}, "accelerator.type"),
    ],
)
def test_what_an_accelerator_cannot_compute_is_refused_with_a_way_out(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(Unplannable) as caught:
        planned(None, **spec)
    (error,) = caught.value.errors
    assert error.path == f"spec.{path}"
    assert "compute capability" in error.message
    assert "use " in error.message


def test_a_newer_accelerator_computes_them_all() -> None:
    model = {"dtype": "BFloat16", "quantization": {"weights": "FP8", "kvCache": "FP8"}}
    planned(None, **gpu("NVIDIA-H100-80GB-HBM3"), model=model)
