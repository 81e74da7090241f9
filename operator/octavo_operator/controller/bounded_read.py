"""Read an HTTP answer to its end, but never more than so much of it."""

from __future__ import annotations

import aiohttp


async def read_up_to(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, cut off after `limit` bytes. `StreamReader.read(n)` would return what has arrived so far."""
    parts: list[bytes] = []
    left = limit
    async for chunk in answer.content.iter_any():
        parts.append(chunk[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    return b"".join(parts)
