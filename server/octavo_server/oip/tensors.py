"""Tensors of the Open Inference Protocol: raw little-endian bytes inside, JSON or binary outside."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo_server.errors import bad_request

MAX_RANK = 8
MAX_ELEMENTS = 2**24

_NUMPY = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"), "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
DATATYPES = frozenset({*_NUMPY, "BF16", "BYTES"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model's signature; -1 in `shape` is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Tensor:
    """`data`: row-major little-endian elements; a BYTES element is its uint32 length and then its bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of_bytes(cls, name: str, elements: Sequence[bytes]) -> Tensor:
        return cls(name, "BYTES", (len(elements),), pack_bytes(elements))

    @classmethod
    def of_numbers(cls, name: str, datatype: str, values: npt.ArrayLike) -> Tensor:
        array = np.atleast_1d(np.asarray(values, dtype=_NUMPY[datatype]))
        return cls(name, datatype, array.shape, array.tobytes())

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def elements(self) -> list[bytes]:
        """The elements of a BYTES tensor."""
        return unpack_bytes(self.name, self.data, self.num_elements)

    def numbers(self) -> npt.NDArray[Any]:
        """The elements of a numeric tensor, in its shape; BF16 comes as float32."""
        if self.datatype == "BF16":
            bits = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << 16
            return bits.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=_NUMPY[self.datatype]).reshape(self.shape)

    def json_data(self) -> list[Any]:
        """Flat values for JSON; bytes that are no UTF-8 are shown with replacement characters."""
        if self.datatype == "BYTES":
            return [element.decode(errors="replace") for element in self.elements()]
        values: list[Any] = self.numbers().reshape(-1).tolist()
        return values


def tensor_from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes) -> Tensor:
    """Check raw bytes against datatype and shape; raises a 400 naming the tensor."""
    count = checked_count(name, datatype, shape)
    if datatype == "BYTES":
        unpack_bytes(name, data, count)
    else:
        expected = count * (2 if datatype == "BF16" else _NUMPY[datatype].itemsize)
        if len(data) != expected:
            raise bad_request(
                f"inputs.{name}: {datatype} of shape {list(shape)} takes {expected} bytes, got {len(data)}", name
            )
    return Tensor(name, datatype, tuple(shape), data)


def tensor_from_values(name: str, datatype: str, shape: Sequence[int], values: Any) -> Tensor:
    """Flat or nested JSON values as a tensor; raises a 400 naming the tensor."""
    count = checked_count(name, datatype, shape)
    flat = list(_flatten(values, MAX_RANK)) if isinstance(values, list) else [values]
    if len(flat) != count:
        raise bad_request(f"inputs.{name}: shape {list(shape)} takes {count} values, got {len(flat)}", name)
    if datatype == "BYTES":
        if not all(isinstance(value, str | bytes) for value in flat):
            raise bad_request(f"inputs.{name}: BYTES takes strings", name)
        packed = pack_bytes([value.encode() if isinstance(value, str) else value for value in flat])
        return Tensor(name, datatype, tuple(shape), packed)
    return Tensor(name, datatype, tuple(shape), _pack_numbers(name, datatype, flat))


def checked_count(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Number of elements; raises a 400 for an unknown datatype or an impossible shape."""
    if datatype not in DATATYPES:
        raise bad_request(f"inputs.{name}: unknown datatype {datatype[:20]!r}", name)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise bad_request(f"inputs.{name}: at most {MAX_RANK} dimensions, none negative, got {list(shape)[:9]}", name)
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise bad_request(f"inputs.{name}: at most {MAX_ELEMENTS} elements, got {count}", name)
    return count


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    """BYTES elements on the wire."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpack_bytes(name: str, data: bytes, count: int) -> list[bytes]:
    """Exactly `count` BYTES elements; raises a 400 when lengths and data disagree."""
    elements: list[bytes] = []
    offset = 0
    while offset < len(data) and len(elements) < count:
        if offset + 4 > len(data):
            break
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + length > len(data):
            raise bad_request(f"inputs.{name}: an element of {length} bytes is cut short", name)
        elements.append(data[offset : offset + length])
        offset += length
    if len(elements) != count or offset != len(data):
        raise bad_request(f"inputs.{name}: the data do not hold exactly {count} BYTES elements", name)
    return elements


def _pack_numbers(name: str, datatype: str, values: list[Any]) -> bytes:
    allowed: tuple[type, ...] = (bool,) if datatype == "BOOL" else (int, float)
    if not all(isinstance(value, allowed) for value in values):
        raise bad_request(f"inputs.{name}: the data hold a value that is no {datatype}", name)
    try:
        if datatype == "BF16":
            bits = np.asarray(values, dtype=np.float32).view(np.uint32)
            return (bits >> 16).astype("<u2").tobytes()
        if datatype.startswith("FP") or datatype == "BOOL":
            return np.asarray(values, dtype=_NUMPY[datatype]).tobytes()
        limits = np.iinfo(str(_NUMPY[datatype]))
        integers = [int(value) for value in values]
        if any(not limits.min <= value <= limits.max for value in integers):
            raise OverflowError
        return np.asarray(integers, dtype=_NUMPY[datatype]).tobytes()
    except (OverflowError, ValueError):
        raise bad_request(f"inputs.{name}: the data hold a value outside {datatype}", name) from None


def _flatten(values: list[Any], depth: int) -> Iterable[Any]:
    if depth == 0 or not any(isinstance(value, list) for value in values):
        return values
    return itertools.chain.from_iterable(
        _flatten(value, depth - 1) if isinstance(value, list) else [value] for value in values
    )
