"""A folder of models in Triton's layout: `NAME/VERSION/model.onnx`."""

from __future__ import annotations

import re
from pathlib import Path

from octavo_engine.errors import ModelLoadError

MODEL_FILE = "model.onnx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def find_models(folder: Path) -> dict[str, tuple[str, Path]]:
    """Name to (newest version, file), from what lies there: a caller's name is only ever looked up in it.

    Raises `ModelLoadError` when the folder cannot be read. Links out of the folder are not followed.
    """
    root = folder.resolve()
    found: dict[str, tuple[str, Path]] = {}
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise ModelLoadError(f"model repository {folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if not entry.is_dir() or not _NAME.fullmatch(entry.name):
            continue
        versions = [
            version
            for version in entry.iterdir()
            if _VERSION.fullmatch(version.name) and (version / MODEL_FILE).is_file()
        ]
        if not versions:
            continue
        newest = max(versions, key=lambda version: int(version.name))
        file = (newest / MODEL_FILE).resolve()
        if file.is_relative_to(root):
            found[entry.name] = (newest.name, file)
    return found
