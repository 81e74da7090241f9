"""The pool of KV blocks: who holds which, which are free, and which still hold a known prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo_engine.kv.free_list import FreeList


class BlockPool:
    """Reference-counted blocks with a prefix cache keyed by content.

    A block is held (reference count above 0) or free. A free block may still be cached: it is found by its key until
    its memory is reused, least recently released first; blocks without a key are reused before any cached one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self._free = FreeList(num_blocks)
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._block_by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones among them."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that live sequences hold."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by content, held or free."""
        return len(self._block_by_key)

    def references(self, block: int) -> int:
        return self._references[block]

    def key_of(self, block: int) -> bytes | None:
        return self._keys[block]

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Cached blocks of the longest known prefix of `keys`; `acquire` them before anything else is allocated."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold cached blocks once more."""
        for block in blocks:
            if self._references[block] == 0:
                self._free.remove(block)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with unknown content, forgetting the oldest cached prefixes; check `num_free` first."""
        blocks = []
        for _ in range(count):
            block = self._free.pop_front()
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back, last first, so that the start of a prefix outlives its end."""
        for block in reversed(blocks):
            remaining = self._references[block] - 1
            if remaining < 0:
                raise ValueError(f"block {block} is released more often than it was acquired")
            self._references[block] = remaining
            if remaining == 0:
                if self._keys[block] is None:
                    self._free.push_front(block)
                else:
                    self._free.push_back(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make a computed full block findable; the first block with that content stays the one that is found."""
        if self.enable_caching and key not in self._block_by_key and self._keys[block] is None:
            self._block_by_key[key] = block
            self._keys[block] = key

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable because their content cannot be trusted."""
        for block in blocks:
            self._forget(block)

    def reset_cache(self) -> None:
        """Forget every cached block; blocks that sequences hold stay theirs, but no one else finds them any more."""
        for block in list(self._block_by_key.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            self._keys[block] = None
            del self._block_by_key[key]
