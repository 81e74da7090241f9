"""Labels that callers put on prefixes, and which of them are cached: a router that sees only text can follow blocks.

A router names each part of a prompt by a hash of its own. The labels come with the request, hang on the block that ends
where the labelled part does, and are told when that block becomes findable and when it is gone from every tier. So what
a router hears is in its own words, whoever's request computed the blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

LABELS_PER_BLOCK = 8
"""Of one block, the newest: the same tokens can come from many texts."""


class PrefixUpdate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of labels: first all are forgotten if `cleared`, then `removed` go, then `stored` come.

    `engine` tells one run of the engine from the next.
    """

    engine: str
    cleared: bool = False
    removed: list[int] = []
    stored: list[int] = []


@dataclass(slots=True)
class _Labelled:
    media: set[str]
    labels: list[int]


class PrefixLabels:
    """Follows the blocks that carry labels; those of blocks that are nowhere cached are forgotten."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._blocks: dict[bytes, _Labelled] = {}
        self._block_of: dict[int, bytes] = {}
        self._cleared = False
        self._removed: dict[int, None] = {}
        self._stored: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def attach(self, key: bytes, label: int, media: Collection[str]) -> None:
        """Hang a label on a block that is cached in `media`; one that hangs somewhere already stays there."""
        if label in self._block_of or not media:
            return
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Labelled(set(media), [])
        block.labels.append(label)
        self._block_of[label] = key
        self._stored[label] = None
        if len(block.labels) > LABELS_PER_BLOCK:
            self._drop(block.labels.pop(0))

    def block_stored(self, key: bytes, medium: str) -> None:
        """A block became findable in a tier."""
        block = self._blocks.get(key)
        if block is not None:
            block.media.add(medium)

    def block_removed(self, key: bytes, medium: str) -> None:
        """A block can no longer be found in a tier."""
        block = self._blocks.get(key)
        if block is None:
            return
        block.media.discard(medium)
        if not block.media:
            del self._blocks[key]
            for label in block.labels:
                self._drop(label)

    def clear(self) -> None:
        """No tier holds anything any more."""
        self._blocks.clear()
        self._block_of.clear()
        self._removed.clear()
        self._stored.clear()
        self._cleared = True

    def take(self) -> PrefixUpdate | None:
        """What happened since the last call, or None."""
        if not (self._cleared or self._removed or self._stored):
            return None
        update = PrefixUpdate(
            engine=self._engine, cleared=self._cleared, removed=list(self._removed), stored=list(self._stored)
        )
        self._cleared, self._removed, self._stored = False, {}, {}
        return update

    def snapshot(self) -> PrefixUpdate:
        """Everything that is cached now, as an update that needs none before it."""
        return PrefixUpdate(engine=self._engine, cleared=True, stored=list(self._block_of))

    def _drop(self, label: int) -> None:
        del self._block_of[label]
        self._stored.pop(label, None)
        self._removed[label] = None
