"""Block tables: which blocks of the pool hold which positions of a sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.events import MEDIUM_HOST
from octavo_engine.kv.hashing import extend_keys
from octavo_engine.kv.host_tier import HostTier


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence; block i holds positions `i * block_size .. (i + 1) * block_size - 1`.

    `keys` are the content keys of its full blocks as far as they were needed; `num_published` of them are computed
    and findable by others, those up to `num_promised` will be. `capacity` is the number of positions the blocks can
    hold. `set_aside` are the host slots of a preempted sequence's first `num_set_aside` positions. `labels` are the
    caller's, each with the number of positions it covers, ascending; the first `num_labelled` of them are handed on.
    """

    root: bytes
    tenant: str = ""
    adapter: str = ""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_promised: int = 0
    capacity: int = 0
    set_aside: list[int] = field(default_factory=list)
    num_set_aside: int = 0
    labels: Sequence[tuple[int, int]] = ()
    num_labelled: int = 0


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What is there of a sequence: device blocks, then host slots, together its first `num_tokens` positions."""

    blocks: list[int]
    slots: list[int] = field(default_factory=list)
    num_tokens: int = 0


class BlockManager:
    """Grows, shares and frees block tables over one pool, with host memory below it if there is some."""

    def __init__(self, pool: BlockPool, host: HostTier | None = None) -> None:
        self.pool = pool
        self.host = host
        if host is not None:
            pool.on_evict = host.demote
        self._block_size = pool.block_size
        self._promised: Counter[bytes] = Counter()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions need."""
        return -(-num_tokens // self._block_size)

    def match_prefix(self, table: BlockTable, tokens: Sequence[int]) -> PrefixMatch:
        """What is cached of the start of `tokens`, leaving at least the last token to compute, for its logits; or what
        was set aside, if that is more."""
        num_blocks = (len(tokens) - 1) // self._block_size if self.pool.enable_caching else 0
        extend_keys(table.keys, table.root, tokens, num_blocks, self._block_size)
        blocks = self.pool.match(table.keys[:num_blocks])
        slots: list[int] = []
        if self.host is not None:
            slots = self.host.pool.match(table.keys[len(blocks) : num_blocks])
        num_cached = (len(blocks) + len(slots)) * self._block_size
        if table.num_set_aside >= num_cached and table.set_aside:
            return PrefixMatch(blocks, table.set_aside[len(blocks) :], table.num_set_aside)
        return PrefixMatch(blocks, slots, num_cached)

    def on_device(self, match: PrefixMatch) -> PrefixMatch:
        """The part of a match that needs no copy."""
        return PrefixMatch(match.blocks, [], len(match.blocks) * self._block_size)

    def num_coming(self, table: BlockTable, match: PrefixMatch) -> int:
        """Blocks after a match that another sequence is computing right now, and that will be findable soon."""
        count = 0
        for key in table.keys[match.num_tokens // self._block_size :]:
            if key not in self._promised:
                break
            count += 1
        return count

    def num_free_after(self, match: PrefixMatch, num_tokens: int) -> int:
        """Free blocks left if a table of `num_tokens` positions began with a match; negative if it does not fit."""
        pool = self.pool
        revived = sum(1 for block in match.blocks if pool.is_free(block))
        return pool.num_free - revived - (self.blocks_for(num_tokens) - len(match.blocks))

    def allocate(self, table: BlockTable, match: PrefixMatch, tokens: Sequence[int]) -> None:
        """Fill an empty table for all of `tokens`, the first of them from a match; what was set aside is given up."""
        num_cached = len(match.blocks)
        self.pool.acquire(match.blocks)
        if self.host is not None:
            self.host.pool.acquire(match.slots)  # before blocks are evicted into the host's room
        table.blocks = [*match.blocks, *self.pool.allocate(self.blocks_for(len(tokens)) - num_cached)]
        table.num_published = num_cached
        table.num_promised = max(num_cached, len(table.keys))
        self._promised.update(table.keys[num_cached:])
        table.capacity = len(table.blocks) * self._block_size
        if self.host is not None and match.slots:
            self.host.fetch(match.slots, table.blocks[num_cached : num_cached + len(match.slots)])
            self.host.pool.release(match.slots, table.tenant)
            self.publish(table, tokens, match.num_tokens)
        if self.host is not None:
            fetched = 0 if table.set_aside else len(match.slots)
            self.host.came_back(table.keys[match.num_tokens // self._block_size :], fetched)
        self._hand_on_labels(table, len(match.blocks))
        self.forget_set_aside(table)

    def set_aside(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> bool:
        """Free a table but keep what it has computed in host memory; False, with nothing changed, without room."""
        if self.host is None or not num_computed:
            return False
        num_full = num_computed // self._block_size if self.pool.enable_caching else 0
        extend_keys(table.keys, table.root, tokens, num_full, self._block_size)
        slots = self.host.set_aside(table.blocks[: self.blocks_for(num_computed)], table.keys[:num_full])
        if slots is None:
            return False
        self.free(table)
        table.set_aside, table.num_set_aside = slots, num_computed
        return True

    def forget_set_aside(self, table: BlockTable) -> None:
        """Let go of a sequence's slots; those that can be found by content stay findable."""
        if self.host is not None and table.set_aside:
            self.host.pool.release(table.set_aside, table.tenant)
        table.set_aside, table.num_set_aside = [], 0

    def distrust(self, table: BlockTable) -> None:
        """Let nobody find what a sequence has computed, here or in host memory."""
        self.pool.unpublish(table.blocks)
        if self.host is not None:
            for key in table.keys:
                self.host.pool.unpublish(self.host.pool.match([key]))

    def num_unshared(self, table: BlockTable) -> int:
        """Blocks that would be free if this table were."""
        return sum(1 for block in table.blocks if self.pool.references(block) == 1)

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
                table.adapter,
            )
        self._hand_on_labels(table, num_full)

    def free(self, table: BlockTable) -> None:
        """Give every block back; the table's keys stay, for a later `match_prefix` of the same sequence."""
        self._keep_promise(table, table.num_promised)
        self.pool.release(table.blocks, table.tenant)
        table.blocks = []
        table.num_published = 0
        table.num_promised = 0
        table.num_labelled = 0
        table.capacity = 0

    def _hand_on_labels(self, table: BlockTable, num_cached: int) -> None:
        """The first `num_cached` blocks can be found now: so can what the caller's labels stand for."""
        for num_tokens, label in table.labels[table.num_labelled :]:
            num_blocks = max(1, num_tokens // self._block_size)
            if num_blocks > num_cached:
                return
            key = table.keys[num_blocks - 1]
            in_host = self.host is not None and bool(self.host.pool.match([key]))
            self.pool.label(key, label, (MEDIUM_HOST,) if in_host else ())
            table.num_labelled += 1

    def _keep_promise(self, table: BlockTable, num_blocks: int) -> None:
        """Blocks up to `num_blocks` are published now, or will not be by this sequence."""
        for key in table.keys[table.num_published : min(num_blocks, table.num_promised)]:
            if self._promised[key] == 1:
                del self._promised[key]
            else:
                self._promised[key] -= 1
        table.num_published = num_blocks
