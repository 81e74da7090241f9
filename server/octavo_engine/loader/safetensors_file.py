"""Checkpoints in Hugging Face's layout: config.json and one or several memory-mapped safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.checkpoint import read_json_object
from octavo_engine.loader.quantized_tensors import quantized_tensors
from octavo_engine.models.raw_config import RawConfig
from octavo_kernels.weights import Weight

_INDEX = "model.safetensors.index.json"
_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors files; tensors stay views of the mapped files.

    A decoder saved without its head has names without `model.` in front; here they get it.
    """

    norms_hold_one = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = RawConfig(_config_values(path), str(path / "config.json"))
        self._files = {file: _open(file) for file in _files(path)}
        self._place = self._index()
        self._prefix = "" if "embed_tokens.weight" not in self._place else "model."
        self._quantized = quantized_tensors(self.config.section("quantization_config"))
        self.is_quantized = self.config.section("quantization_config") is not None
        self.names = frozenset(self._prefix + name for name in self._whole_names())

    def get(self, name: str) -> Weight:
        name = name.removeprefix(self._prefix)
        layer = name.removesuffix(".weight")
        if self._quantized is not None and f"{layer}.{self._quantized.marker}" in self._place:
            return self._quantized.assemble(layer, self._tensor, frozenset(self._place))
        return self._tensor(name)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._place:
            raise ModelLoadError(f"{self.path}: tensor {name!r} is missing")
        file = self._place[name]
        try:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelLoadError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        if tensor.dtype not in _DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise ModelLoadError(f"{file}: tensor {name!r} has type {tensor.dtype}; supported: {known}")
        return tensor

    def _whole_names(self) -> set[str]:
        """The names a model may ask for: the parts of a quantized layer are its one `weight`."""
        if self._quantized is None:
            return set(self._place)
        whole = set()
        for name in self._place:
            layer, _, part = name.rpartition(".")
            whole.add(f"{layer}.weight" if part in self._quantized.parts else name)
        return whole

    def _index(self) -> dict[str, Path]:
        place: dict[str, Path] = {}
        for file, opened in self._files.items():
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if name in place:
                    raise ModelLoadError(f"{file}: tensor {name!r} is also in {place[name].name}")
                place[name] = file
        return place


def _config_values(path: Path) -> dict[str, Any]:
    """config.json, completed by what only generation_config.json says."""
    values = dict(read_json_object(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.exists():
        stop = read_json_object(generation).get("eos_token_id")
        values["eos_token_id"] = stop if stop is not None else values.get("eos_token_id")
    return values


def _files(path: Path) -> list[Path]:
    """The weight files: those of the index, or the only one, or model.safetensors among several."""
    if (path / _INDEX).exists():
        index = read_json_object(path / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ModelLoadError(f"{path / _INDEX}: weight_map must be a non-empty object")
        names = sorted({str(name) for name in index.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelLoadError(f"{path / _INDEX}: {name!r} is no plain .safetensors file name")
            if not (path / name).is_file():
                raise ModelLoadError(f"{path}: {name} is missing although {_INDEX} names it; download it again")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1 and path / "model.safetensors" in found:
        return [path / "model.safetensors"]
    if len(found) != 1:
        raise ModelLoadError(f"{path}: holds {len(found)} .safetensors files but no {_INDEX} that orders them")
    return found


def _open(file: Path) -> Any:
    """Map a file; the library checks header size, bounds and overlaps."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(f"{file}: is no valid safetensors file: {error}") from error
