"""Free blocks in eviction order: an intrusive doubly linked list over block ids."""

from __future__ import annotations


class FreeList:
    """Least recently used first; push, pop and remove in O(1). Ids run from 0 to `num_blocks - 1`.

    The links live in two flat lists, indexed by block id, with `num_blocks` as the sentinel of the ring.
    """

    __slots__ = ("_length", "_next", "_previous", "_sentinel")

    def __init__(self, num_blocks: int) -> None:
        self._sentinel = num_blocks
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._previous: list[int] = [num_blocks, *range(num_blocks)]
        self._length = num_blocks

    def __len__(self) -> int:
        return self._length

    def pop_front(self) -> int:
        """Take the next block to reuse; raises `IndexError` when none is free."""
        block = self._next[self._sentinel]
        if block == self._sentinel:
            raise IndexError("pop from an empty free list")
        self.remove(block)
        return block

    def push_front(self, block: int) -> None:
        """Reuse this block before all others."""
        self._insert(self._sentinel, block)

    def push_back(self, block: int) -> None:
        """Reuse this block after all others."""
        self._insert(self._previous[self._sentinel], block)

    def remove(self, block: int) -> None:
        """Take a block out, wherever it stands."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self._length -= 1

    def _insert(self, before: int, block: int) -> None:
        after = self._next[before]
        self._next[before] = block
        self._previous[after] = block
        self._next[block] = after
        self._previous[block] = before
        self._length += 1
