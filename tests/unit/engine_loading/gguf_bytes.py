"""GGUF files written byte by byte, so that tests can make them wrong in exactly one way."""

from __future__ import annotations

import struct
from collections.abc import Sequence

UINT32, STRING, ARRAY, UINT8 = 4, 8, 9, 0
F32, Q4_0 = 0, 2


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def metadata(key: str, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + payload


def array(item_type: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", item_type, count) + payload


def tensor(name: str, dims: Sequence[int], ggml_type: int, offset: int) -> bytes:
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", ggml_type, offset)


def gguf(
    *,
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
) -> bytes:
    """A whole file; counts are those of the lists unless the test lies about them."""
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    body = header + b"".join(entries) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + data
