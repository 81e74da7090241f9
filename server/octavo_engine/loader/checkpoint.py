"""A checkpoint as models see it: tensors under Hugging Face's names, whatever the files are called inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from octavo_engine.errors import ModelLoadError
from octavo_engine.models.raw_config import RawConfig
from octavo_kernels.weights import Weight

_MAX_JSON_BYTES = 64 << 20


class Checkpoint(Protocol):
    """Weights and settings of one model, opened but not yet read."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> RawConfig:
        """config.json, or GGUF metadata in its terms."""

    @property
    def names(self) -> frozenset[str]:
        """Every tensor there is."""

    @property
    def is_quantized(self) -> bool:
        """Whether projections are stored in fewer than 16 bits a weight."""

    @property
    def norms_hold_one(self) -> bool:
        """Whether norm weights are stored with the `1 +` of Gemma's norms already added (GGUF does)."""

    def get(self, name: str) -> Weight:
        """One tensor, on the CPU, as stored; it may be a view of the mapped file. Raises `ModelLoadError`."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a folder with one, or a folder in Hugging Face's layout."""
    from octavo_engine.loader.gguf_checkpoint import GGUFCheckpoint
    from octavo_engine.loader.safetensors_file import SafetensorsCheckpoint

    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path)
        raise ModelLoadError(f"{path}: expected a .gguf file or a folder with config.json and .safetensors files")
    if not path.is_dir():
        raise ModelLoadError(f"{path}: does not exist")
    if any(path.glob("*.safetensors")):
        return SafetensorsCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    first = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(first) == 1:
        return GGUFCheckpoint(first[0])
    if first:
        raise ModelLoadError(f"{path}: holds {len(first)} GGUF models; name one of {', '.join(f.name for f in first)}")
    pickled = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    hint = f" ({pickled[0]} is a pickle, which can run code and is never loaded)" if pickled else ""
    raise ModelLoadError(f"{path}: holds neither .safetensors nor .gguf files{hint}")


def read_json_object(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file of bounded size; raises `ModelLoadError`."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadError(f"{path}: larger than {_MAX_JSON_BYTES} bytes, which no such file is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value
