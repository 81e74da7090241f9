"""How a checkpoint wants its token states pooled, as sentence-transformers writes it down."""

from __future__ import annotations

import json
from pathlib import Path

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.checkpoint import read_json_object
from octavo_engine.runner.pooling import Pooling, PoolingMethod

_FLAGS = {
    "pooling_mode_mean_tokens": PoolingMethod.MEAN,
    "pooling_mode_cls_token": PoolingMethod.CLS,
    "pooling_mode_lasttoken": PoolingMethod.LAST,
}


def is_embedding_checkpoint(path: Path) -> bool:
    """Whether the folder is laid out by sentence-transformers."""
    return (path / "modules.json").is_file()


def read_pooling(path: Path, default: PoolingMethod) -> Pooling:
    """The pooling and normalisation modules of a checkpoint; the default, normalised, where it names none."""
    if not is_embedding_checkpoint(path):
        return Pooling(default, normalize=True)
    modules = _modules(path / "modules.json")
    pooling = next((part for kind, part in modules if kind.endswith(".Pooling")), None)
    method = default if pooling is None else _method(path, pooling, default)
    return Pooling(method, normalize=any(kind.endswith(".Normalize") for kind, _ in modules))


def _modules(file: Path) -> list[tuple[str, str]]:
    """(type, folder) of each module."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelLoadError(f"{file}: must be a list of modules with type and path: {error}") from error


def _method(path: Path, folder: str, default: PoolingMethod) -> PoolingMethod:
    if Path(folder).name != folder:
        raise ModelLoadError(f"{path / 'modules.json'}: {folder!r} is no plain folder name")
    file = path / folder / "config.json"
    values = read_json_object(file)
    chosen = [method for flag, method in _FLAGS.items() if values.get(flag)]
    others = [name for name, value in values.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or len(others) != 1:
        named = values.get("pooling_mode")
        if isinstance(named, str) and named in {"mean", "cls", "lasttoken"}:
            return {"mean": PoolingMethod.MEAN, "cls": PoolingMethod.CLS, "lasttoken": PoolingMethod.LAST}[named]
        if not others:
            return default
        raise ModelLoadError(f"{file}: pools by {', '.join(others)}; one of {', '.join(_FLAGS)} is supported")
    return chosen[0]
