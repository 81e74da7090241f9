"""Models that already lie on a file system: paths, `file://`, and volumes mounted by Kubernetes."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.safe_path import safe_join
from octavo_engine.storage.selection import PICKLE_SUFFIXES
from octavo_engine.storage.uri import StorageURI


def from_path(uri: StorageURI) -> Path:
    """A plain path or `file:///absolute/path`; raises `ModelLoadError` when no model is there."""
    location = uri.location
    if uri.text != uri.location:
        location = urllib.parse.unquote(location.removeprefix("localhost"))
        if not location.startswith("/"):
            raise ModelLoadError(
                f"model {uri.text!r}: file:// takes an absolute path with three slashes, such as file:///models/llama"
            )
    path = Path(location).expanduser()
    if not path.exists():
        hub_like = re.fullmatch(r"[\w.-]+/[\w.-]+", location)
        hint = f"; for a model of the Hugging Face hub write hf://{location}" if hub_like else ""
        raise ModelLoadError(f"model {uri.text!r}: no such file or folder{hint}")
    return model_at(path.absolute(), uri.text)


def from_claim(uri: StorageURI) -> Path:
    """`pvc://CLAIM/PATH`: the claim is mounted at `$OCTAVO_PVC_ROOT/CLAIM` (root: /mnt/models)."""
    root = Path(os.environ.get("OCTAVO_PVC_ROOT", "/mnt/models"))
    claim, _, inner = uri.location.strip("/").partition("/")
    mount = safe_join(root, claim)
    if not mount.is_dir():
        raise ModelLoadError(
            f"model {uri.text!r}: the volume is not mounted at {mount}; mount the claim there or set OCTAVO_PVC_ROOT"
        )
    path = safe_join(mount, inner) if inner else mount
    if not path.exists():
        raise ModelLoadError(f"model {uri.text!r}: the volume {mount} holds no {inner!r}")
    return model_at(path, uri.text)


def model_at(path: Path, shown_as: str) -> Path:
    """The model a path stands for: a GGUF file, a checkpoint folder, or the one GGUF file of a folder."""
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ModelLoadError(
                f"model {shown_as!r}: {path.name} is a pickle file, which can run code when read; "
                "convert the model to safetensors or GGUF"
            )
        raise ModelLoadError(f"model {shown_as!r}: name a .gguf file or the folder of a checkpoint, not {path.name}")
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return gguf_files[0]
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise ModelLoadError(f"model {shown_as!r}: the folder holds several GGUF files, name one of: {names}")
    raise ModelLoadError(f"model {shown_as!r}: the folder holds neither config.json nor a .gguf file")
