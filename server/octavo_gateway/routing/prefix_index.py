"""Which prompt prefixes each replica has cached, as far as it tells, or probably: chained block hashes per endpoint."""

from __future__ import annotations

import base64
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import xxhash

BLOCK_BYTES = 256
"""Bytes of prompt text per hashed block: about 64 tokens, four KV blocks of 16."""

BLOCK_TOKENS = BLOCK_BYTES // 4

MAX_BLOCKS = 256
"""Longest prefix that is told apart; beyond 64 KiB of shared text the first blocks decide."""

PREFIX = b"x-octavo-prefix"

MIN_LEARNED_BLOCKS = 64
MAX_SENT_BLOCKS = 4_096


def chain_hashes(prompt: bytes | memoryview, seed: bytes, block_bytes: int = BLOCK_BYTES) -> tuple[int, ...]:
    """Hash each full block of `prompt` chained to the one before, starting from `seed`.

    `seed` carries model, adapter and the tenant's salt, so equal text of two tenants never shares a hash.
    Two prompts share exactly as many leading hashes as they share whole leading blocks.
    """
    view = memoryview(prompt)
    state = xxhash.xxh3_64_intdigest(seed)
    hashes: list[int] = []
    for start in range(0, min(len(view) // block_bytes, MAX_BLOCKS) * block_bytes, block_bytes):
        state = xxhash.xxh3_64_intdigest(view[start : start + block_bytes], seed=state)
        hashes.append(state)
    return tuple(hashes)


def prefix_value(prefix: Sequence[int], prompt_bytes: int) -> bytes:
    """The value of the header `PREFIX`: by these names a replica tells which blocks of the prompt it holds."""
    hashes = base64.b64encode(struct.pack(f"<{len(prefix)}Q", *prefix))
    return b"%d/%d;%b" % (prompt_bytes, BLOCK_BYTES, hashes)


_NOTHING: Mapping[int, None] = {}


class PrefixIndex:
    """Endpoint id -> LRU of block hashes, bounded in total.

    An endpoint is either guessed at, by what was sent to it, or followed: then its engine tells what it stores and
    removes, and what was sent counts only until the request has ended. The budget is shared evenly by the endpoints
    known, so no endpoint's history can push out another's, and memory stays flat however many prompts pass (about 100
    bytes a block).
    """

    def __init__(self, max_blocks: int = 500_000) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks: must be at least 1, got {max_blocks}")
        self.max_blocks = max_blocks
        self._blocks: dict[str, OrderedDict[int, None]] = {}
        self._learned: dict[str, int] = {}  # blocks that an endpoint's engine seems to keep
        self._sent: dict[str, OrderedDict[int, None]] = {}  # of endpoints that are followed: not yet told as stored

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._blocks.values())

    def matched(self, endpoint_id: str, prefix: Sequence[int]) -> int:
        """How many leading blocks of `prefix` this endpoint probably has cached."""
        blocks = self._blocks.get(endpoint_id) or _NOTHING
        sent = self._sent.get(endpoint_id) or _NOTHING
        count = 0
        for block in prefix:
            if block not in blocks and block not in sent:
                break
            count += 1
        return count

    def record(self, endpoint_id: str, prefix: Sequence[int]) -> None:
        """Remember that this endpoint now computes (and so caches) these blocks.

        Blocks are touched last to first, so that eviction takes a chain from its tail and never orphans it.
        """
        if not prefix:
            return
        sent = self._sent.get(endpoint_id)
        if sent is None:
            self._touch(endpoint_id, prefix)
            return
        known = self._blocks[endpoint_id]
        sent.update((block, None) for block in prefix if block not in known)
        while len(sent) > MAX_SENT_BLOCKS:
            sent.popitem(last=False)

    def ended(self, endpoint_id: str, prefix: Sequence[int]) -> None:
        """A request with these blocks has ended: what its engine has not told as stored by now was not kept."""
        sent = self._sent.get(endpoint_id)
        if sent:
            for block in prefix:
                sent.pop(block, None)

    def follow(self, endpoint_id: str) -> None:
        """From here on this endpoint's engine tells what it holds, beginning with nothing."""
        self._blocks[endpoint_id] = OrderedDict()
        self._sent.setdefault(endpoint_id, OrderedDict())
        self._shrink_all()

    def unfollow(self, endpoint_id: str) -> None:
        """The engine has fallen silent: what it held is guessed on from there."""
        self._sent.pop(endpoint_id, None)

    def stored(self, endpoint_id: str, blocks: Sequence[int]) -> None:
        """An endpoint that is followed holds these now."""
        sent = self._sent.get(endpoint_id)
        if sent is None:
            return
        for block in blocks:
            sent.pop(block, None)
        self._touch(endpoint_id, blocks)

    def removed(self, endpoint_id: str, blocks: Iterable[int]) -> None:
        """An endpoint that is followed holds these no more."""
        known = self._blocks.get(endpoint_id)
        if known is not None and endpoint_id in self._sent:
            for block in blocks:
                known.pop(block, None)

    def observe(self, endpoint_id: str, expected_blocks: int, num_blocks: int, cached_fraction: float) -> None:
        """Learn from the engine's own cached-token count how much this endpoint really keeps.

        `expected_blocks` of the prompt's `num_blocks` were believed cached when the request was sent. Where much less
        was there, the engine has evicted what the index still believes in: the endpoint's share of the index shrinks,
        oldest first, as the engine's cache did. Where the belief held it grows back slowly.
        """
        blocks = self._blocks.get(endpoint_id)
        if blocks is None or expected_blocks <= 0 or endpoint_id in self._sent:
            return
        share = self._limit(endpoint_id)
        if cached_fraction * num_blocks < 0.5 * expected_blocks:
            self._learned[endpoint_id] = max(MIN_LEARNED_BLOCKS, int(0.9 * min(share, len(blocks))))
            self._shrink(endpoint_id, blocks)
        elif endpoint_id in self._learned:
            self._learned[endpoint_id] += max(1, share // 500)

    def expect(self, endpoint_id: str, blocks: int) -> None:
        """Begin with the belief that this endpoint's engine keeps about so many blocks, as it says of itself.

        What is observed later counts more: a second cache tier keeps more, other tenants of the cache leave less.
        """
        self._learned.setdefault(endpoint_id, max(MIN_LEARNED_BLOCKS, blocks))

    def forget(self, endpoint_id: str) -> None:
        """Drop what is known of an endpoint that is gone or has reset its cache."""
        for known in (self._blocks, self._learned, self._sent):
            known.pop(endpoint_id, None)

    def retain(self, endpoint_ids: set[str]) -> None:
        """Drop every endpoint that is not in the set."""
        for gone in (self._blocks.keys() | self._learned.keys() | self._sent.keys()) - endpoint_ids:
            self.forget(gone)

    def _touch(self, endpoint_id: str, blocks: Sequence[int]) -> None:
        known = self._blocks.get(endpoint_id)
        if known is None:
            known = self._blocks[endpoint_id] = OrderedDict()
            self._shrink_all()
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        self._shrink(endpoint_id, known)

    def _limit(self, endpoint_id: str) -> int:
        fair = max(1, self.max_blocks // max(1, len(self._blocks)))
        if endpoint_id in self._sent:
            return fair
        return min(fair, self._learned.get(endpoint_id, fair))

    def _shrink(self, endpoint_id: str, blocks: OrderedDict[int, None]) -> None:
        limit = self._limit(endpoint_id)
        while len(blocks) > limit:
            blocks.popitem(last=False)

    def _shrink_all(self) -> None:
        for endpoint_id, blocks in self._blocks.items():
            self._shrink(endpoint_id, blocks)
