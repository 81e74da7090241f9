"""Free blocks, and in which order their memory is reused."""

from __future__ import annotations

from collections import OrderedDict

NUM_CLASSES = 5


class EvictionQueue:
    """Blocks without content first, then surplus of tenants over their share, then by GreedyDual with frequency.

    Each cached block has the priority `age + 2 ** class`, where its class grows with the logarithm of how often it was
    hit, and `age` is the priority of the last block evicted (Cherkasova, GreedyDual-Size with Frequency, 1998). A
    prefix that is used again and again so outlives any number of prompts seen once, and still goes when its time is
    over. Inside a class the order is least recently used, so only the heads of a few classes are compared: every
    operation takes constant time. A child is never hit more often than its parent nor released after it, so prefixes
    shrink from their end.

    A tenant with more than `tenant_quota` cached blocks has its least recently used ones marked as surplus; they stay
    findable until anybody needs memory.
    """

    def __init__(self, num_blocks: int, tenant_quota: int | None = None) -> None:
        self._quota = tenant_quota
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._surplus: OrderedDict[int, None] = OrderedDict()
        self._classes: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_CLASSES)]
        self._place: dict[int, OrderedDict[int, None]] = {}
        self._priority = [0] * num_blocks
        self._tenant: dict[int, str] = {}
        self._by_tenant: dict[str, OrderedDict[int, None]] = {}
        self._age = 0

    def __len__(self) -> int:
        return len(self._unused) + len(self._place)

    def add_unused(self, block: int) -> None:
        """A free block with nothing worth keeping."""
        self._unused.append(block)

    def add_cached(self, block: int, num_hits: int, tenant: str) -> None:
        """A free block that may be asked for again."""
        rank = min(NUM_CLASSES - 1, num_hits.bit_length())
        self._priority[block] = self._age + (1 << rank)
        self._place[block] = self._classes[rank]
        self._classes[rank][block] = None
        if self._quota is not None:
            self._tenant[block] = tenant
            owned = self._by_tenant.setdefault(tenant, OrderedDict())
            owned[block] = None
            if len(owned) > self._quota:
                self._make_surplus(next(iter(owned)))

    def remove(self, block: int) -> None:
        """Take out a cached block because it is held again or forgotten."""
        del self._place.pop(block)[block]
        self._disown(block)

    def pop(self) -> int:
        """Take the block to reuse next; raises `IndexError` when none is free."""
        if self._unused:
            return self._unused.pop()
        if self._surplus:
            block = next(iter(self._surplus))
        else:
            heads = [next(iter(blocks)) for blocks in self._classes if blocks]
            if not heads:
                raise IndexError("pop from an empty eviction queue")
            block = min(heads, key=self._priority.__getitem__)
            self._age = self._priority[block]
        self.remove(block)
        return block

    def _make_surplus(self, block: int) -> None:
        del self._place[block][block]
        self._disown(block)
        self._place[block] = self._surplus
        self._surplus[block] = None

    def _disown(self, block: int) -> None:
        tenant = self._tenant.pop(block, None)
        if tenant is not None:
            owned = self._by_tenant[tenant]
            del owned[block]
            if not owned:
                del self._by_tenant[tenant]
