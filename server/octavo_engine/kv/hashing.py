"""Content keys of KV blocks: a chained 256-bit hash, so that equal keys mean equal prefixes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 32


def root_key(cache_salt: str = "", extra: tuple[str, ...] = ()) -> bytes:
    """The parent of a sequence's first block.

    Everything besides tokens that decides a block's content or who may share it goes in here: the tenant's salt,
    an adapter's name. Each part is length-prefixed, so that no two lists of parts collide.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in (cache_salt, *extra):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], num_blocks: int, block_size: int) -> None:
    """Append the keys of blocks `len(keys) .. num_blocks - 1` of `tokens`; only full blocks have keys."""
    first = len(keys)
    if num_blocks <= first:
        return
    parent = keys[-1] if keys else root
    raw = array("i", tokens[first * block_size : num_blocks * block_size]).tobytes()
    stride = block_size * array("i").itemsize
    for offset in range(0, len(raw), stride):
        parent = blake2b(raw[offset : offset + stride], digest_size=DIGEST_BYTES, key=parent).digest()
        keys.append(parent)
