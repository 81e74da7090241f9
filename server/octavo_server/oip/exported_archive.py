"""Read a `.pt2` file of `torch.export.save`: its graph as plain JSON and its weights as raw bytes, nothing else.

Torch's own loader unpickles sample inputs and evaluates symbolic expressions; none of that is touched here. Source: the
PT2 archive format of PyTorch (schema version 8).
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo_engine.errors import ModelLoadError

SCHEMA_MAJOR = 8
MAX_ENTRIES = 100_000
MAX_JSON_BYTES = 64 << 20
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,128}")


@dataclass(frozen=True, slots=True)
class ExportedArchive:
    """A program as it was saved. tensors: parameters, buffers and constants by their own names."""

    graph: Mapping[str, Any]
    signature: Mapping[str, Any]
    ranges: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def read_archive(path: Path) -> ExportedArchive:
    """Raises `ModelLoadError` for anything that is no plain, whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelLoadError(f"{path}: is no archive of torch.export.save: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, IndexError) as error:
        raise ModelLoadError(f"{path}: the archive is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _read(archive: zipfile.ZipFile, path: Path) -> ExportedArchive:
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) > MAX_ENTRIES:
        raise ModelLoadError(f"{path}: the archive claims {len(entries)} entries")
    for info in entries.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
            raise ModelLoadError(
                f"{path}: {info.filename[:80]!r} is compressed; torch.export.save stores entries plain"
            )
    models = [name for name in entries if re.fullmatch(r"[^/]+/models/[^/]+\.json", name)]
    if len(models) != 1:
        raise ModelLoadError(
            f"{path}: holds {len(models)} programs; save one with torch.export.save of torch 2.8 or newer"
        )
    root, _, file = models[0].partition("/models/")
    program = _json(archive, entries[models[0]], path)
    found = program["schema_version"]["major"]
    if found != SCHEMA_MAJOR:
        raise ModelLoadError(f"{path}: has schema version {found!r}, and {SCHEMA_MAJOR} is read; export it again")
    tensors: dict[str, torch.Tensor] = {}
    for kind, config in (("weights", "weights_config"), ("constants", "constants_config")):
        table = f"{root}/data/{kind}/{file.removesuffix('.json')}_{config}.json"
        if table in entries:
            for name, item in _json(archive, entries[table], path)["config"].items():
                tensors[name] = _tensor(archive, entries, f"{root}/data/{kind}", name, item, path)
    graph_module = program["graph_module"]
    return ExportedArchive(
        graph_module["graph"], graph_module["signature"], program.get("range_constraints") or {}, tensors
    )


def _json(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Any:
    if info.file_size > MAX_JSON_BYTES:
        raise ModelLoadError(f"{path}: {info.filename[:80]!r} is larger than {MAX_JSON_BYTES >> 20} MiB")
    return json.loads(archive.read(info))


def _tensor(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    folder: str,
    name: str,
    item: Mapping[str, Any],
    path: Path,
) -> torch.Tensor:
    if item["use_pickle"]:
        raise ModelLoadError(f"{path}: {name} is stored as a pickle, which can run code and is never loaded")
    if not _FILE_NAME.fullmatch(item["path_name"]):
        raise ModelLoadError(f"{path}: {name} names the odd file {item['path_name'][:80]!r}")
    meta = item["tensor_meta"]
    if meta["dtype"] not in DTYPES or meta["layout"] != 7:
        raise ModelLoadError(f"{path}: {name} is of a type or layout that is not supported")
    dtype = DTYPES[meta["dtype"]]
    sizes, strides = _sizes(meta["sizes"]), _sizes(meta["strides"])
    offset = meta["storage_offset"]["as_int"]
    info = entries[f"{folder}/{item['path_name']}"]
    stored = info.file_size // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min((*sizes, *strides, offset, 0)) < 0 or (math.prod(sizes) and last >= stored):
        raise ModelLoadError(f"{path}: {name} of shape {sizes} does not fit into its {info.file_size} bytes")
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(archive.read(info)), dtype=dtype)
    return flat.as_strided(sizes, strides, offset)


def _sizes(values: Sequence[Mapping[str, int]]) -> tuple[int, ...]:
    return tuple(value["as_int"] for value in values)
