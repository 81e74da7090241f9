"""Write a quantized model as a checkpoint folder: weights, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo_engine.errors import ConfigError, ModelLoadError
from octavo_engine.loader.checkpoint import Checkpoint
from octavo_engine.quantize.layout import Layout
from octavo_engine.quantize.observed import ObservingLoader
from octavo_engine.quantize.scheme import Scheme
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_kernels.weights import QuantizedWeight

MAX_SHARD_BYTES = 4 << 30
COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", "model.safetensors.index.json")
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "SmolLM3ForCausalLM": "smollm3",
}


def output_tensors(
    checkpoint: Checkpoint, loader: ObservingLoader, scheme: Scheme, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the new checkpoint under its Hugging Face name."""
    quantized = {f"{prefix}.weight": (prefix, item) for item in loader.projections for prefix in item.rows}
    for name in sorted(loader.tensors_read):
        if name in quantized:
            prefix, projection = quantized[name]
            weight = projection.quantized.get(prefix)
            if weight is not None:
                yield from layout.encode(prefix, weight, scheme).items()
            else:
                yield name, projection.weight[projection.rows_of(prefix)].to(dtype)
        elif name in loader.vectors:
            tensor, offset = loader.vectors[name]
            yield name, (tensor - offset).to(dtype)
        elif name in loader.biases:
            projection, rows = loader.biases[name]
            if projection.bias is not None:
                yield name, projection.bias[rows].to(dtype)
        else:
            plain = checkpoint.get(name)
            yield name, (plain.dequantize(dtype) if isinstance(plain, QuantizedWeight) else plain.to(dtype))


def write_checkpoint(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], checkpoint: Checkpoint, settings: Mapping[str, Any]
) -> int:
    """Write a whole folder or none; returns the bytes of its weights. Raises `ConfigError` for a folder in use."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output {folder}: the folder is not empty; name a new one")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        num_bytes = _write_shards(partial, tensors)
        _write_config(partial, checkpoint, settings)
        _write_tokenizer(partial, checkpoint.path)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise ModelLoadError(f"output {folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        if pending:
            save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        if sum(item.nbytes for item in pending.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
        pending[name] = tensor.cpu().contiguous()
        sizes[name] = tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return sum(sizes.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return sum(sizes.values())


def _write_config(folder: Path, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    config = dict(checkpoint.config.values) | dict(settings)
    if "model_type" not in config:
        names = config.get("architectures") or [""]
        if names[0] not in MODEL_TYPES:
            raise ModelLoadError(f"{checkpoint.path}: no configuration is known to write for {names[0]!r}")
        config["model_type"] = MODEL_TYPES[names[0]]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(folder: Path, source: Path) -> None:
    """Copy the small files of a folder, or write those of a GGUF file's own tokenizer."""
    if source.is_dir():
        for pattern in COPIED:
            for path in source.glob(pattern):
                if path.is_file() and path.name not in NOT_COPIED:
                    shutil.copyfile(path, folder / path.name)
        return
    tokenizer = load_tokenizer(source)
    tokenizer.save(folder)
