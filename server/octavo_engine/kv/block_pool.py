"""The pool of KV blocks: who holds which, which are free, and which still hold a known prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from octavo_engine.kv.events import MEDIUM_DEVICE, KVEventLog
from octavo_engine.kv.eviction import EvictionQueue


class BlockPool:
    """Reference-counted blocks with a prefix cache keyed by content.

    A block is held (reference count above 0) or free. A free block may still be cached: it is found by its key until
    its memory is reused, in the order of `EvictionQueue`. `tenant_quota` bounds the share of all blocks that one
    tenant's cached blocks may keep others from. `events`, if given, hears what becomes findable and what does not.
    `on_evict` hears (block, key, tenant) of a cached block right before its memory is given to somebody else.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_caching: bool = True,
        tenant_quota: float = 1.0,
        events: KVEventLog | None = None,
        medium: str = MEDIUM_DEVICE,
    ) -> None:
        self.on_evict: Callable[[int, bytes, str], None] | None = None
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self._free = EvictionQueue(num_blocks, int(tenant_quota * num_blocks) if tenant_quota < 1.0 else None)
        self._references = [0] * num_blocks
        self._hits = [0] * num_blocks
        self._events = events
        self._medium = medium
        self._tenants = [""] * num_blocks
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
            self._hits[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with unknown content, forgetting the least valuable prefixes; check `num_free` first."""
        blocks = []
        for _ in range(count):
            block = self._free.pop()
            key = self._keys[block]
            if key is not None and self.on_evict is not None:
                self.on_evict(block, key, self._tenants[block])
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int], tenant: str = "") -> None:
        """Give blocks back, last first, so that the start of a prefix outlives its end."""
        for block in reversed(blocks):
            remaining = self._references[block] - 1
            if remaining < 0:
                raise ValueError(f"block {block} is released more often than it was acquired")
            self._references[block] = remaining
            if remaining == 0:
                if self._keys[block] is None:
                    self._free.add_unused(block)
                else:
                    self._tenants[block] = tenant
                    self._free.add_cached(block, self._hits[block], tenant)

    def publish(self, block: int, key: bytes) -> bool:
        """Make a computed full block findable; False if another block with that content is the one that is found."""
        if not self.enable_caching or key in self._block_by_key or self._keys[block] is not None:
            return False
        self._block_by_key[key] = block
        self._keys[block] = key
        return True

    def announce(self, keys: list[bytes], parent: bytes | None, tokens: list[int], adapter: str = "") -> None:
        """Tell the event log of a chain of blocks that was published."""
        if self._events is not None:
            self._events.stored(keys, parent, tokens, adapter, self._medium)

    def label(self, key: bytes, label: int, other_media: Sequence[str] = ()) -> None:
        """Tell the event log of a caller's label of a cached block; `other_media` are tiers that have it too."""
        if self._events is not None and key in self._block_by_key:
            self._events.labelled(key, label, (self._medium, *other_media))

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable because their content cannot be trusted."""
        for block in blocks:
            self._drop(block)

    def reset_cache(self) -> None:
        """Forget every cached block; blocks that sequences hold stay theirs, but no one else finds them any more."""
        events, self._events = self._events, None
        for block in list(self._block_by_key.values()):
            self._drop(block)
        self._events = events
        if events is not None and self._medium == MEDIUM_DEVICE:
            events.cleared()

    def _drop(self, block: int) -> None:
        """Forget a block where it stands; one that is free has nothing worth keeping from then on."""
        if self._keys[block] is not None and self._references[block] == 0:
            self._free.remove(block)
            self._free.add_unused(block)
        self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        self._hits[block] = 0
        if key is not None:
            self._keys[block] = None
            del self._block_by_key[key]
            if self._events is not None:
                self._events.removed(key, self._medium)
