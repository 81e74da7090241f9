"""GGUF v2 and v3 files, mapped into memory; nothing in the header is believed before it is checked.

Source of the layout: the GGUF specification of ggml. A file comes from strangers: every count, length and offset is
compared with the bytes that are there before anything is allocated or sliced, so a hostile file costs one error.
"""

from __future__ import annotations

import enum
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo_engine.errors import ModelLoadError
from octavo_kernels.gguf_types import GGMLType

MetadataValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_LENGTH = struct.Struct("<Q")
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_METADATA = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_ARRAY_ITEMS = 1 << 23  # in all arrays together
_MAX_NAME_BYTES = 1 << 12
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20
_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: `shape` row-major ([out_features, in_features]), `data` its bytes as uint8 [rows, bytes_per_row].

    `data` is a view of the mapped file; it must not be written to.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    data: torch.Tensor


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open file: its metadata by key and its tensors by name. The mapping lives as long as any tensor does."""

    path: Path
    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, GGUFTensor]


def open_gguf(path: Path) -> GGUFFile:
    """Map and check a GGUF file; raises `ModelLoadError` saying what is wrong and at which byte."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read as a GGUF file: {error}") from error
    cursor = _Cursor(path, mapped)
    version = _read_version(cursor)
    num_tensors = cursor.count("tensors", _MAX_TENSORS, _MIN_TENSOR_BYTES)
    num_metadata = cursor.count("metadata entries", _MAX_METADATA, _MIN_METADATA_BYTES)
    metadata = _read_metadata(cursor, num_metadata)
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = _alignment(cursor, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    _check_extents(cursor, entries, data_start, alignment)
    tensors = {entry.name: _map_tensor(mapped, entry, data_start) for entry in entries}
    return GGUFFile(path, version, metadata, tensors)


class _ValueType(enum.IntEnum):
    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    _ValueType.UINT8: "B",
    _ValueType.INT8: "b",
    _ValueType.UINT16: "H",
    _ValueType.INT16: "h",
    _ValueType.UINT32: "I",
    _ValueType.INT32: "i",
    _ValueType.FLOAT32: "f",
    _ValueType.BOOL: "?",
    _ValueType.UINT64: "Q",
    _ValueType.INT64: "q",
    _ValueType.FLOAT64: "d",
}


class _Cursor:
    """Reads little-endian values off a mapped file and refuses to run past its end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self.array_items_left = _MAX_ARRAY_ITEMS
        self._mapped = mapped
        self.size = len(mapped)

    def fail(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {message} (near byte {self.position}); the file is damaged or no GGUF")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.size - self.position:
            raise self.fail(f"{what} needs {num_bytes} bytes but only {self.size - self.position} are left")

    def raw(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        start, self.position = self.position, self.position + num_bytes
        return self._mapped[start : self.position]

    def unpack(self, code: str, count: int, what: str) -> tuple[bool | int | float, ...]:
        return struct.unpack(f"<{count}{code}", self.raw(count * struct.calcsize("<" + code), what))

    def integer(self, code: str, what: str) -> int:
        return int(self.unpack(code, 1, what)[0])

    def count(self, what: str, limit: int, min_bytes: int) -> int:
        """A u64 that counts things of at least `min_bytes` each."""
        value = self.integer("Q", f"the number of {what}")
        if value > limit:
            raise self.fail(f"claims {value} {what}; at most {limit} are accepted")
        self.need(value * min_bytes, f"a table of {value} {what}")
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.integer("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.fail(f"{what} claims {length} bytes; at most {limit} are accepted")
        return self.raw(length, what).decode("utf-8", errors="replace")

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings at once: vocabularies hold hundreds of thousands."""
        mapped, size, position, found = self._mapped, self.size, self.position, []
        for _ in range(count):
            start = position + 8
            if start > size:
                self.need(size + 1, what)
            position = start + _LENGTH.unpack_from(mapped, position)[0]
            if position > size:
                self.position = start
                self.need(position - start, what)
            found.append(mapped[start:position].decode("utf-8", errors="replace"))
        self.position = position
        return found


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.raw(4, "the magic number")
    if magic != _MAGIC:
        raise cursor.fail(f"starts with {magic!r} instead of {_MAGIC!r}")
    version = cursor.integer("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _VERSIONS:
            raise ModelLoadError(f"{cursor.path}: big-endian GGUF is not supported; convert it to little-endian")
        raise ModelLoadError(f"{cursor.path}: GGUF version {version} is not supported; versions 2 and 3 are")
    return version


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(count):
        key = cursor.string("a metadata key", _MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> MetadataValue:
    kind = _value_type(cursor, key)
    if kind is _ValueType.ARRAY:
        return _read_array(cursor, key)
    if kind is _ValueType.STRING:
        return cursor.string(f"the value of {key}")
    return cursor.unpack(_SCALARS[kind], 1, f"the value of {key}")[0]


def _read_array(cursor: _Cursor, key: str) -> MetadataValue:
    kind = _value_type(cursor, key)
    if kind is _ValueType.ARRAY:
        raise cursor.fail(f"{key} nests arrays, which no known model does")
    width = 8 if kind is _ValueType.STRING else struct.calcsize("<" + _SCALARS[kind])
    count = cursor.count(f"items of {key}", cursor.array_items_left, width)
    cursor.array_items_left -= count
    if kind is _ValueType.STRING:
        return cursor.strings(count, f"an item of {key}")
    items: MetadataValue = list(cursor.unpack(_SCALARS[kind], count, f"the items of {key}"))
    return items


def _value_type(cursor: _Cursor, key: str) -> _ValueType:
    number = cursor.integer("I", f"the type of {key}")
    try:
        return _ValueType(number)
    except ValueError:
        raise cursor.fail(f"{key} has the unknown value type {number}") from None


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int  # from the start of the data section
    rows: int
    bytes_per_row: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.bytes_per_row


def _read_tensor_entry(cursor: _Cursor) -> _TensorEntry:
    name = cursor.string("a tensor name", _MAX_NAME_BYTES)
    num_dims = cursor.integer("I", f"the rank of {name}")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} claims {num_dims} dimensions; 1 to {_MAX_DIMS} are possible")
    dims = tuple(int(d) for d in cursor.unpack("Q", num_dims, f"the shape of {name}"))
    number = cursor.integer("I", f"the type of {name}")
    offset = cursor.integer("Q", f"the offset of {name}")
    try:
        ggml_type = GGMLType(number)
    except ValueError:
        known = ", ".join(t.name for t in GGMLType)
        raise ModelLoadError(f"{cursor.path}: tensor {name!r} has GGML type {number}; supported: {known}") from None
    width, rows = dims[0], 1
    for dim in dims[1:]:
        rows *= dim
    if width < 1 or rows < 1 or width * rows > cursor.size * 256:
        raise cursor.fail(f"tensor {name!r} has the impossible shape {list(reversed(dims))}")
    if width % ggml_type.block_size:
        raise cursor.fail(
            f"tensor {name!r} has rows of {width} weights, no multiple of {ggml_type.name}'s {ggml_type.block_size}"
        )
    bytes_per_row = width // ggml_type.block_size * ggml_type.block_bytes
    return _TensorEntry(name, tuple(reversed(dims)), ggml_type, offset, rows, bytes_per_row)


def _alignment(cursor: _Cursor, metadata: Mapping[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool) or not 8 <= value <= _MAX_ALIGNMENT or value % 8:
        raise cursor.fail(f"general.alignment must be a multiple of 8 up to {_MAX_ALIGNMENT}, got {value!r}")
    return value


def _check_extents(cursor: _Cursor, entries: list[_TensorEntry], data_start: int, alignment: int) -> None:
    """Every tensor aligned, inside the file, under a name of its own, and over nobody else's bytes."""
    if len({entry.name for entry in entries}) != len(entries):
        raise cursor.fail("two tensors have the same name")
    previous: _TensorEntry | None = None
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.offset % alignment:
            raise cursor.fail(f"tensor {entry.name!r} starts at {entry.offset}, not aligned to {alignment}")
        if data_start + entry.end > cursor.size:
            raise cursor.fail(
                f"tensor {entry.name!r} ends at byte {data_start + entry.end} of {cursor.size}: the file is truncated"
            )
        if previous is not None and entry.offset < previous.end:
            raise cursor.fail(f"tensors {previous.name!r} and {entry.name!r} overlap")
        previous = entry


def _map_tensor(mapped: mmap.mmap, entry: _TensorEntry, data_start: int) -> GGUFTensor:
    count = entry.rows * entry.bytes_per_row
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=data_start + entry.offset)
    return GGUFTensor(entry.name, entry.shape, entry.ggml_type, flat.view(entry.rows, entry.bytes_per_row))
