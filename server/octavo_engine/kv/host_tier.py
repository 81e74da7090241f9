"""Host memory below the device's blocks: prefixes that were evicted, and sequences that were set aside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.transfers import Direction, Transfer, TransferQueue

FIRST_LEAST_RATE = 0.3
_RATE_WEIGHT = 0.002


class HostTier:
    """A pool of host blocks ("slots") with the same keys, eviction order and tenant quotas as the device's.

    Nothing is copied here: the copies that a decision needs are queued, and `take_transfers` hands them to whoever
    computes, before the next step.

    Evicted blocks are taken in while they are likely to come back: `return_rate` is how many blocks were asked for
    again for each that was evicted, of late. Of those not taken in, the keys are remembered as long as their content
    might have stayed, so that the rate is learned from them too. Prompts that are seen once cost no copies.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.least_rate = FIRST_LEAST_RATE
        self.return_rate = 0.0
        self._gone: OrderedDict[bytes, None] = OrderedDict()
        self.num_stored = 0
        self.num_fetched = 0
        self._transfers = TransferQueue()

    @property
    def has_transfers(self) -> bool:
        return bool(self._transfers)

    def take_transfers(self) -> list[Transfer]:
        return self._transfers.take()

    def demote(self, block: int, key: bytes, tenant: str) -> None:
        """A cached device block is about to be reused: keep its content, if it is not here, there is room, and
        evicted blocks come back often enough."""
        self.return_rate *= 1.0 - _RATE_WEIGHT
        if self.pool.match([key]):
            return
        if self.return_rate < self.least_rate or not self.pool.num_free:
            self._remember(key)
            return
        (slot,) = self._store([block])
        self._publish(slot, key)
        self.pool.release([slot], tenant)

    def came_back(self, missing: Sequence[bytes], num_fetched: int) -> None:
        """A sequence started: it has fetched so many blocks, and these it must compute."""
        gone = [key for key in missing if key in self._gone]
        for key in gone:
            del self._gone[key]
        self.return_rate = min(1.0, self.return_rate + _RATE_WEIGHT * (len(gone) + num_fetched))

    def _remember(self, key: bytes) -> None:
        self._gone[key] = None
        self._gone.move_to_end(key)
        if len(self._gone) > self.pool.num_blocks:
            self._gone.popitem(last=False)

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
