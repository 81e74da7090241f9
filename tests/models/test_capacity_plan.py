"""`octavo plan` says before what the engine reports after, and refuses what cannot fit with what would."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from models.test_classification_models import CASES as CLASSIFIERS
from models.test_decoder_architectures import CASES as DECODERS
from models.tiny_checkpoints import SIZES, load, write_checkpoint
from octavo_cli.main import build_app
from octavo_cli.plan import gpu_memory_bytes
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.planning.capacity import DoesNotFitError, plan_with_fixes
from octavo_engine.planning.measuring import measure

GIB = 1 << 30
ARCHITECTURES = {**DECODERS, **{f"{name}, classifier": case for name, case in CLASSIFIERS.items()}}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDE = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "vocab_size": 512}


def _plan_cli(*arguments: str) -> tuple[int, Any, str]:
    result = CliRunner().invoke(build_app("plan"), ["plan", *arguments, "--json"])
    return result.exit_code, json.loads(result.stdout) if result.stdout else None, result.stderr


@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}, {"kv_cache_dtype": "int8"}, {"dtype": "float32"}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_is_what_the_engine_then_reports(tied: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE, tie_word_embeddings=tied))
    common = {"max_num_seqs": 4, "max_model_len": 128, **settings}

    found = measure(tmp_path, EngineConfig(model="m", **common), CPU, elsewhere=False)
    planned = plan_with_fixes("m", EngineConfig(model="m", **common), lambda _: found, "cpu", 4 * GIB)
    info = load(tmp_path, **{"dtype": "auto", **common}, num_kv_blocks=0, block_size=16).info

    assert planned.weight_bytes == pytest.approx(info.weight_bytes, rel=0.05)
    assert planned.kv_bytes_per_token == info.kv_bytes_per_token
    assert planned.kv_blocks == info.kv_blocks_total == 4 * 128 // 16
    assert planned.dtype == info.dtype


def test_the_real_model_in_its_own_blocks(smollm2_gguf: Path) -> None:
    code, planned, _ = _plan_cli(str(smollm2_gguf), "--max-model-len", "512", "--max-num-seqs", "8")
    info = load(smollm2_gguf, max_model_len=512, max_num_seqs=8, num_kv_blocks=0, block_size=16, dtype="auto").info

    assert code == 0
    assert planned["weight_bytes"] == pytest.approx(info.weight_bytes, rel=0.05)
    assert planned["kv_blocks"] == pytest.approx(info.kv_blocks_total, rel=0.05)
    assert planned["concurrency_full_length"] == 8
    assert planned["dtype"] == info.dtype


@pytest.mark.parametrize("split", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 3}])
def test_a_rank_is_planned_as_it_loads(split: dict[str, int], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.Qwen3ForCausalLM, hf.Qwen3Config(**WIDE))
    config = EngineConfig(model="m", dtype="float32", **split)

    found = measure(tmp_path, config, CPU, elsewhere=False)

    whole = measure(tmp_path, EngineConfig(model="m", dtype="float32"), CPU, elsewhere=False)
    assert found.kv_bytes_per_token == whole.kv_bytes_per_token // config.num_ranks
    if "tensor_parallel_size" in split:
        info = load(tmp_path, **split).info
        assert found.weight_bytes == pytest.approx(info.weight_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_measured_as_it_loads(name: str, tmp_path: Path) -> None:
    model_type, config = ARCHITECTURES[name]
    write_checkpoint(tmp_path, model_type, config())

    found = measure(tmp_path, EngineConfig(model="m", dtype="float32"), CPU, elsewhere=False)
    info = load(tmp_path).info

    assert found.weight_bytes == pytest.approx(info.weight_bytes, rel=0.02)
    assert found.kv_bytes_per_token == info.kv_bytes_per_token


# ------------------------------------------------------------------ models no test machine holds


def write_sparse_checkpoint(path: Path, config: Any) -> list[tuple[str, int]]:
    """A checkpoint with a true header and no data: holes of a file read as zeros. Returns (name, numbers)."""
    path.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    names = list(shapes)
    shards = [names[first : first + 60] for first in range(0, len(names), 60)]
    for index, members in enumerate(shards):
        _write_sparse(path / f"model-{index}.safetensors", {name: shapes[name] for name in members})
    weight_map = {name: f"model-{index}.safetensors" for index, members in enumerate(shards) for name in members}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "architectures": [type(model).__name__]}))
    return [(name, torch.Size(shape).numel()) for name, shape in shapes.items()]


def _write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(text) + end)


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Any:
    return hf.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=131_072,
        **more,
    )


MODELS: dict[str, Any] = {
    "8B": _llama(32, 4096, 14336, 32, 8, 128_256),
    "70B": _llama(80, 8192, 28672, 64, 8, 128_256),
    "3B, tied": _llama(28, 3072, 8192, 24, 8, 128_256, tie_word_embeddings=True),
    "7B, many key heads": _llama(32, 4096, 11008, 32, 32, 32_000),
}
# GPU, context, cache, tensor ranks; what fits is decided by arithmetic below
SETTINGS = [
    ("H200", 131_072, "bfloat16", 1),
    ("H100", 32_768, "bfloat16", 1),
    ("H100", 131_072, "int8", 2),
    ("A100-40GB", 8_192, "bfloat16", 1),
    ("L4", 4_096, "bfloat16", 1),
    ("L4", 4_096, "fp8", 4),
    ("24GiB", 2_048, "int8", 2),
    ("16GiB", 1_024, "bfloat16", 1),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[tuple[str, int]]]]:
    root = tmp_path_factory.mktemp("sparse")

    @functools.cache
    def write(name: str) -> tuple[Path, list[tuple[str, int]]]:
        return root / name, write_sparse_checkpoint(root / name, MODELS[name])

    return write


@pytest.mark.parametrize(("gpu", "context", "cache", "ranks"), SETTINGS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "8B" else pytest.mark.slow) for name in MODELS]
)
def test_blocks_are_those_of_a_count_by_hand(
    name: str, gpu: str, context: int, cache: str, ranks: int, checkpoint: Any
) -> None:
    path, numbers = checkpoint(name)
    config, memory = MODELS[name], gpu_memory_bytes(gpu)
    settings = EngineConfig(model="m", max_model_len=context, kv_cache_dtype=cache, tensor_parallel_size=ranks)
    weights = sum(count * 2 for _, count in numbers) / ranks
    kv_heads = config.num_key_value_heads // ranks
    bytes_per_number, scales = (2, 0) if cache == "bfloat16" else (1, 8)
    per_token = config.num_hidden_layers * kv_heads * (2 * 128 * bytes_per_number + scales)
    free = memory - 600 * 2**20 - weights
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    width = 4 * config.hidden_size + (heads * 128 + 3 * config.intermediate_size) // ranks
    step = 8_192 * width * 2 + 2 * 128 * config.vocab_size * 4
    by_hand = min(min(0.9 * free, free - step) / (16 * per_token), 128 * context / 16)

    def measured(of: EngineConfig) -> Any:
        return measure(path, of, CUDA, elsewhere=True)

    if by_hand * 16 < context:
        with pytest.raises(DoesNotFitError, match=r"does not fit: needs [\d.]+ GiB a device for .*, have") as refused:
            plan_with_fixes(name, settings, measured, "cuda", memory)
        assert refused.value.need_bytes > refused.value.have_bytes
        assert len(refused.value.fixes) <= 3
        return
    planned = plan_with_fixes(name, settings, measured, "cuda", memory)
    assert planned.kv_blocks == pytest.approx(by_hand, rel=0.05)


def test_what_does_not_fit_is_told_three_smallest_fixes_that_do(checkpoint: Any) -> None:
    path, _ = checkpoint("8B")
    settings = EngineConfig(model="m", max_model_len=131_072)

    def attempt(of: EngineConfig) -> Any:
        return plan_with_fixes("8B", of, lambda c: measure(path, c, CUDA, elsewhere=True), "cuda", 24 * GIB)

    with pytest.raises(DoesNotFitError) as refused:
        attempt(settings)

    assert [fix.setting for fix in refused.value.fixes] == [
        "--max-model-len 32768",
        "--quantization int4",
        "--tensor-parallel-size 2",
    ]
    assert attempt(EngineConfig(model="m", max_model_len=32_768)).kv_blocks * 16 >= 32_768


def test_the_command_refuses_with_exit_code_one(checkpoint: Any) -> None:
    path, _ = checkpoint("8B")

    code, said, _ = _plan_cli(str(path), "--gpu", "16GiB", "--max-model-len", "4096")

    assert code == 1
    assert said["fits"] is False
    assert said["need_bytes"] > said["have_bytes"] == 16 * GIB
    assert said["fixes"][-1]["setting"].startswith("--tensor-parallel-size")


def test_a_context_the_checkpoint_merely_allows_is_cut_as_the_engine_cuts_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**{**WIDE, "max_position_embeddings": 4_096}))
    config = EngineConfig(model="m", max_num_seqs=4, dtype="float32", kv_cache_memory_bytes=600 * 768)

    planned = plan_with_fixes("m", config, lambda c: measure(tmp_path, c, CPU, elsewhere=False), "cpu", 4 * GIB)

    assert planned.kv_bytes_per_token == 768
    assert planned.max_model_len == planned.kv_blocks * 16 == 592
    assert planned.concurrency_full_length == 1.0


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="'GTX' is not known; give its memory instead"):
        gpu_memory_bytes("GTX")
