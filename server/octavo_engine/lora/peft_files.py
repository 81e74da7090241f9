"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, checked against the model."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.checkpoint import read_json_object
from octavo_engine.lora.adapter import Adapter, AdapterTarget, LowRank

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")
_HEADER_ROOM = 1 << 20
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Options that change what the matrices mean; anything but these values is refused, never ignored.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}


def read_adapter(
    name: str, path: Path, targets: Mapping[str, AdapterTarget], max_rank: int, dtype: torch.dtype
) -> Adapter:
    """Read an adapter for a model with these `targets`; its matrices are copied in `dtype`.

    Raises `ModelLoadError` naming the file and what is wrong with it: another method than LoRA, a projection this
    model does not have, a wrong shape or type, a rank above `max_rank`, values that are not finite, a missing half.
    """
    config = read_json_object(path / _CONFIG)
    where = path / _CONFIG
    _check_method(config, where)
    file = path / _WEIGHTS
    _check_size(file, targets, max_rank)
    pairs = _read_pairs(file, targets, max_rank)
    if not pairs:
        raise ModelLoadError(f"{file}: holds no LoRA matrices (names such as base_model.model.*.lora_A.weight)")
    scaling = _Scaling(config, where)
    changes = {}
    for module, (down, up) in pairs.items():
        changes[module] = LowRank(down.to(dtype), up.to(dtype), scaling.of(module, down.shape[0]))
    rank = max(change.down.shape[0] for change in changes.values())
    return Adapter(name, str(path), _digest(path), rank, changes)


def _check_method(config: Mapping[str, Any], where: Path) -> None:
    method = config.get("peft_type")
    if method != "LORA":
        raise ModelLoadError(f"{where}: peft_type is {method!r}; only LORA adapters are served")
    for option, plain in _PLAIN.items():
        if config.get(option) not in plain:
            raise ModelLoadError(f"{where}: {option} is {config[option]!r}, which this engine does not apply")


def _check_size(file: Path, targets: Mapping[str, AdapterTarget], max_rank: int) -> None:
    """A file larger than every target at full rank in float32 cannot be right; it is not even opened."""
    try:
        size = file.stat().st_size
    except OSError as error:
        hint = ""
        if (file.parent / "adapter_model.bin").exists():
            hint = " (adapter_model.bin is a pickle, which can run code and is never loaded: save it as safetensors)"
        raise ModelLoadError(f"{file}: cannot be read{hint}") from error
    most = 4 * max_rank * sum(target.in_features + target.out_features for target in targets.values()) + _HEADER_ROOM
    if size > most:
        raise ModelLoadError(
            f"{file}: {size} bytes are more than an adapter of rank {max_rank} for this model can have ({most}); "
            "raise max_lora_rank if the rank is higher"
        )


def _read_pairs(
    file: Path, targets: Mapping[str, AdapterTarget], max_rank: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) by the name of the projection."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for tensor_name in opened.keys():  # noqa: SIM118 (no mapping)
                module, part = _place(tensor_name, file, targets)
                shape = tuple(opened.get_slice(tensor_name).get_shape())
                _check_shape(tensor_name, shape, part, targets[module], max_rank, file)
                halves.setdefault(module, {})[part] = _checked(opened.get_tensor(tensor_name), tensor_name, file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(f"{file}: is no valid safetensors file: {error}") from error
    pairs = {}
    for module, parts in halves.items():
        if len(parts) != 2 or parts["A"].shape[0] != parts["B"].shape[1]:
            raise ModelLoadError(f"{file}: {module} needs lora_A and lora_B of one rank")
        pairs[module] = (parts["A"], parts["B"])
    return pairs


def _place(tensor_name: str, file: Path, targets: Mapping[str, AdapterTarget]) -> tuple[str, str]:
    """(projection, half) that a tensor belongs to."""
    found = _TENSOR.fullmatch(tensor_name)
    if found is None:
        raise ModelLoadError(f"{file}: {tensor_name[:200]!r} is no tensor of a plain LoRA adapter")
    if found["module"] not in targets:
        known = sorted({name.rpartition(".")[2] for name in targets})
        raise ModelLoadError(
            f"{file}: {found['module'][:200]!r} is no projection that adapters can change here; "
            f"this model has {', '.join(known)} in layers 0 to {_num_layers(targets) - 1}"
        )
    return found["module"], found["part"]


def _num_layers(targets: Mapping[str, AdapterTarget]) -> int:
    return len({name.split(".")[2] for name in targets})


def _check_shape(
    tensor_name: str, shape: tuple[int, ...], part: str, target: AdapterTarget, max_rank: int, file: Path
) -> None:
    wide = target.in_features if part == "A" else target.out_features
    at_rank, at_width = (0, 1) if part == "A" else (1, 0)
    if len(shape) != 2 or shape[at_width] != wide:
        wanted = f"[rank, {wide}]" if part == "A" else f"[{wide}, rank]"
        raise ModelLoadError(f"{file}: {tensor_name} has shape {list(shape)}, this model needs {wanted}")
    if not 1 <= shape[at_rank] <= max_rank:
        raise ModelLoadError(
            f"{file}: {tensor_name} has rank {shape[at_rank]}, allowed are 1 to {max_rank}; raise max_lora_rank"
        )


def _checked(tensor: torch.Tensor, tensor_name: str, file: Path) -> torch.Tensor:
    if tensor.dtype not in _FLOATS:
        raise ModelLoadError(f"{file}: {tensor_name} has type {tensor.dtype}; expected floating point")
    if not bool(torch.isfinite(tensor).all()):
        raise ModelLoadError(f"{file}: {tensor_name} holds NaN or infinite values")
    return tensor.clone()  # out of the mapped file: it may change or go


class _Scaling:
    """alpha / rank for each projection, or alpha / sqrt(rank) where `use_rslora` (arXiv 2312.03732) says so."""

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self._where = where
        self._alpha = self._number("lora_alpha", config.get("lora_alpha"))
        self._by_root = config.get("use_rslora") is True
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(_PLAIN_NAME.fullmatch(str(key)) for key in patterns):
            raise ModelLoadError(f"{where}: alpha_pattern must be an object of plain module names")
        self._patterns = {
            str(key): self._number(f"alpha_pattern.{str(key)[:80]}", value) for key, value in patterns.items()
        }

    def of(self, module: str, rank: int) -> float:
        # PEFT matches a key as a regular expression at the end of a module's name; from a file only names are taken.
        ends = [alpha for key, alpha in self._patterns.items() if module == key or module.endswith(f".{key}")]
        alpha = ends[0] if ends else self._alpha
        return alpha / (math.sqrt(rank) if self._by_root else rank)

    def _number(self, field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelLoadError(f"{self._where}: {field} must be a number, got {str(value)[:80]!r}")
        return float(value)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name in (_CONFIG, _WEIGHTS):
        with (path / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
