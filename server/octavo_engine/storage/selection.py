"""Which files of a repository or bucket make a model we may read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from octavo_engine.errors import ModelLoadError

TEXT_SUFFIXES = (".json", ".txt", ".jinja")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def choose_files(shown_as: str, names: Sequence[str], base_uri: str) -> list[str]:
    """Safetensors with the text files beside them, or the only GGUF file; raises `ModelLoadError`.

    names: relative paths. shown_as: for messages. base_uri: what a file name is appended to.
    """
    top_level = [name for name in names if "/" not in name]
    weights = [name for name in top_level if name.endswith(".safetensors")]
    if any(name.startswith("model") for name in weights):
        weights = [name for name in weights if name.startswith("model")]
    if weights:
        return sorted(weights + [name for name in top_level if PurePosixPath(name).suffix in TEXT_SUFFIXES])
    gguf_files = sorted(name for name in names if name.lower().endswith(".gguf"))
    if len(gguf_files) == 1:
        return gguf_files
    if gguf_files:
        raise ModelLoadError(f"{shown_as}: holds several GGUF files; name one as {base_uri}/FILE: {listed(gguf_files)}")
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise ModelLoadError(
            f"{shown_as}: the weights come only as pickle files, which can run code when read; "
            "convert them to safetensors, or name a place that has safetensors or GGUF files"
        )
    raise ModelLoadError(f"{shown_as}: holds no safetensors and no GGUF files")


def model_name(shown_as: str, chosen: Sequence[str]) -> str:
    """What of the chosen files is the model: the GGUF file, or `.` for the folder; raises `ModelLoadError`."""
    if len(chosen) == 1 and chosen[0].lower().endswith(".gguf"):
        return chosen[0]
    if not {"config.json", "adapter_config.json"} & set(chosen):
        raise ModelLoadError(f"{shown_as}: holds safetensors files but no config.json that describes the model")
    return "."


def listed(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
