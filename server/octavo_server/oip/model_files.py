"""A folder of models in Triton's layout: `NAME/VERSION/model.onnx` or `NAME/VERSION/model.pt2`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from octavo_engine.errors import ModelLoadError
from octavo_server.oip.array_model import ArrayProgram

logger = logging.getLogger("octavo.server")

MODEL_FILES = ("model.onnx", "model.pt2")
_PICKLES = ("model.pt", "model.pth", "model.pkl")
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
            if _VERSION.fullmatch(version.name) and _model_file(version) is not None
        ]
        if not versions:
            continue
        newest = max(versions, key=lambda version: int(version.name))
        file = _model_file(newest)
        if file is not None and file.is_relative_to(root):
            found[entry.name] = (newest.name, file)
    return found


def load_program(path: Path) -> ArrayProgram:
    """What a model's file computes; raises `ModelLoadError`."""
    if path.suffix == ".onnx":
        from octavo_server.oip.onnx_model import OnnxProgram

        return OnnxProgram(path)
    from octavo_server.oip.exported_program import ExportedProgram

    return ExportedProgram(path)


def warn_of_pickles(folder: Path) -> None:
    """Say why files that lie there are not served."""
    for name in _PICKLES:
        for file in folder.glob(f"*/*/{name}"):
            logger.warning(
                "%s is TorchScript or a pickle, which can run code and is never loaded; torch.export.save makes a "
                "model.pt2, torch.onnx.export a model.onnx",
                file,
            )


def _model_file(version: Path) -> Path | None:
    return next((file.resolve() for name in MODEL_FILES if (file := version / name).is_file()), None)
