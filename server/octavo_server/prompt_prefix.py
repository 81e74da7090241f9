"""A router's names for the parts of a prompt that it has only seen as text: read from a header, placed on tokens."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from dataclasses import dataclass

from octavo_server.errors import ApiError, bad_request

PREFIX_HEADER = "x-octavo-prefix"
MAX_LABELS = 256
_VALUE = re.compile(r"(\d{1,12})/(\d{1,9});([A-Za-z0-9+/]*={0,2})")


@dataclass(frozen=True, slots=True)
class PromptPrefix:
    """Hashes of the first whole `block_bytes` of a prompt whose text has `num_bytes`, each chained to those before."""

    num_bytes: int = 0
    block_bytes: int = 1
    hashes: tuple[int, ...] = ()

    def labels(self, num_tokens: int) -> list[tuple[int, int]]:
        """(number of tokens, hash) of each block, for a prompt of so many tokens.

        Text and tokens are taken to go along evenly. That errs by the unevenness of one prompt, and a router that is
        told a block too early or too late sends a request to a replica that has to compute some tokens more.
        """
        return [
            (max(1, num_tokens * (number * self.block_bytes) // self.num_bytes), label)
            for number, label in enumerate(self.hashes, start=1)
        ]


NO_PREFIX = PromptPrefix()


def prefix_from(value: str | None) -> PromptPrefix:
    """Read `BYTES/BLOCK;BASE64` with 8 bytes, little-endian, a hash; raises a 400 naming the header."""
    if value is None:
        return NO_PREFIX
    match = _VALUE.fullmatch(value)
    if match is None:
        raise _malformed()
    num_bytes, block_bytes = int(match[1]), int(match[2])
    try:
        raw = base64.b64decode(match[3], validate=True)
    except binascii.Error:
        raise _malformed() from None
    count, rest = divmod(len(raw), 8)
    if rest or not 0 < count <= MAX_LABELS or not 0 < count * block_bytes <= num_bytes:
        raise _malformed()
    return PromptPrefix(num_bytes, block_bytes, struct.unpack(f"<{count}Q", raw))


def _malformed() -> ApiError:
    return bad_request(
        f"{PREFIX_HEADER}: must be BYTES/BLOCK;HASHES with at most {MAX_LABELS} hashes of whole blocks", PREFIX_HEADER
    )
