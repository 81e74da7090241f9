"""Block tables: which blocks of the pool hold which positions of a sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.hashing import extend_keys


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence; block i holds positions `i * block_size .. (i + 1) * block_size - 1`.

    `keys` are the content keys of its full blocks as far as they were needed; `num_published` of them are computed
    and findable by others, those up to `num_promised` will be. `capacity` is the number of positions the blocks can
    hold.
    """

    root: bytes
    tenant: str = ""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_promised: int = 0
    capacity: int = 0


class BlockManager:
    """Grows, shares and frees block tables over one pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._block_size = pool.block_size
        self._promised: Counter[bytes] = Counter()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions need."""
        return -(-num_tokens // self._block_size)

    def match_prefix(self, table: BlockTable, tokens: Sequence[int]) -> list[int]:
        """Cached blocks at the start of `tokens`, leaving at least the last token to compute, for its logits."""
        if not self.pool.enable_caching:
            return []
        num_blocks = (len(tokens) - 1) // self._block_size
        extend_keys(table.keys, table.root, tokens, num_blocks, self._block_size)
        return self.pool.match(table.keys[:num_blocks])

    def num_coming(self, table: BlockTable, cached: Sequence[int]) -> int:
        """Blocks after `cached` that another sequence is computing right now, and that will be findable soon."""
        count = 0
        for key in table.keys[len(cached) :]:
            if key not in self._promised:
                break
            count += 1
        return count

    def num_free_after(self, cached: Sequence[int], num_tokens: int) -> int:
        """Free blocks left if a table of `num_tokens` positions began with `cached`; negative if it does not fit."""
        pool = self.pool
        revived = sum(1 for block in cached if pool.is_free(block))
        return pool.num_free - revived - (self.blocks_for(num_tokens) - len(cached))

    def allocate(self, table: BlockTable, cached: Sequence[int], num_tokens: int) -> None:
        """Fill an empty table for `num_tokens` positions, the first of them from the cache."""
        self.pool.acquire(cached)
        table.blocks = [*cached, *self.pool.allocate(self.blocks_for(num_tokens) - len(cached))]
        table.num_published = len(cached)
        table.num_promised = max(len(cached), len(table.keys))
        self._promised.update(table.keys[len(cached) :])
        table.capacity = len(table.blocks) * self._block_size

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` positions; False, with nothing changed, when the pool has too few blocks."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            table.blocks.extend(self.pool.allocate(missing))
            table.capacity = len(table.blocks) * self._block_size
        return True

    def publish(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Make the full blocks among the first `num_computed` positions findable; call it once they are computed."""
        num_full = num_computed // self._block_size
        if num_full <= table.num_published or not self.pool.enable_caching:
            return
        extend_keys(table.keys, table.root, tokens, num_full, self._block_size)
        first = table.num_published
        fresh = [self.pool.publish(table.blocks[index], table.keys[index]) for index in range(first, num_full)]
        self._keep_promise(table, num_full)
        if any(fresh):
            first += fresh.index(True)
            self.pool.announce(
                table.keys[first:num_full],
                table.keys[first - 1] if first else None,
                list(tokens[first * self._block_size : num_full * self._block_size]),
            )

    def free(self, table: BlockTable) -> None:
        """Give every block back; the table's keys stay, for a later `match_prefix` of the same sequence."""
        self._keep_promise(table, table.num_promised)
        self.pool.release(table.blocks, table.tenant)
        table.blocks = []
        table.num_published = 0
        table.num_promised = 0
        table.capacity = 0

    def _keep_promise(self, table: BlockTable, num_blocks: int) -> None:
        """Blocks up to `num_blocks` are published now, or will not be by this sequence."""
        for key in table.keys[table.num_published : min(num_blocks, table.num_promised)]:
            if self._promised[key] == 1:
                del self._promised[key]
            else:
                self._promised[key] -= 1
        table.num_published = num_blocks
