"""Host memory below the device's blocks: prefixes that were evicted, and sequences that were set aside."""

from __future__ import annotations

from collections.abc import Sequence

from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.transfers import Direction, Transfer, TransferQueue


class HostTier:
    """A pool of host blocks ("slots") with the same keys, eviction order and tenant quotas as the device's.

    Nothing is copied here: the copies that a decision needs are queued, and `take_transfers` hands them to whoever
    computes, before the next step. `demotions_left` bounds the evicted blocks that are still taken in before that: a
    long prompt that sweeps the cache must not hold up the step it comes in with.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.demotions_left = 1 << 30
        self.num_stored = 0
        self.num_fetched = 0
        self._transfers = TransferQueue()

    @property
    def has_transfers(self) -> bool:
        return bool(self._transfers)

    def take_transfers(self) -> list[Transfer]:
        return self._transfers.take()

    def demote(self, block: int, key: bytes, tenant: str) -> None:
        """A cached device block is about to be reused: keep its content, if it is not here and there is room."""
        if self.demotions_left < 1 or not self.pool.num_free or self.pool.match([key]):
            return
        self.demotions_left -= 1
        (slot,) = self._store([block])
        self._publish(slot, key)
        self.pool.release([slot], tenant)

    def set_aside(self, blocks: Sequence[int], keys: Sequence[bytes]) -> list[int] | None:
        """Hold copies of a sequence's blocks, the first of which have `keys`; None, with nothing changed, if there is
        no room. What is here already is not copied again."""
        found = [self.pool.match([key]) for key in keys]
        present = [slots[0] for slots in found if slots]
        revived = sum(1 for slot in present if self.pool.is_free(slot))
        if len(blocks) - len(present) + revived > self.pool.num_free:
            return None
        self.pool.acquire(present)
        fresh = iter(self._store([block for i, block in enumerate(blocks) if i >= len(keys) or not found[i]]))
        held = [found[i][0] if i < len(keys) and found[i] else next(fresh) for i in range(len(blocks))]
        for slot, key in zip(held, keys, strict=False):
            self._publish(slot, key)
        return held

    def fetch(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy held slots into device blocks."""
        self.num_fetched += len(slots)
        for slot, block in zip(slots, blocks, strict=True):
            self._transfers.add(Direction.TO_DEVICE, slot, block)

    def _store(self, blocks: Sequence[int]) -> list[int]:
        """Copy device blocks into slots, which are held afterwards."""
        self.num_stored += len(blocks)
        slots = self.pool.allocate(len(blocks))
        for block, slot in zip(blocks, slots, strict=True):
            self._transfers.add(Direction.TO_HOST, block, slot)
        return slots

    def _publish(self, slot: int, key: bytes) -> None:
        if self.pool.publish(slot, key):
            self.pool.announce([key], None, [])
