"""What happens to cached blocks, in the message format of vLLM's KV events, so that KV-aware routers work unchanged."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection

import msgspec

from octavo_engine.kv.prefix_labels import PrefixLabels, PrefixUpdate

MEDIUM_DEVICE = "GPU"  # vLLM's name for the first tier, wherever it lies
MEDIUM_HOST = "CPU"


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Blocks became findable: a chain that continues `parent_block_hash`."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = MEDIUM_DEVICE
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Blocks cannot be found any more."""

    block_hashes: list[bytes]
    medium: str | None = MEDIUM_DEVICE


class AllBlocksCleared(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The cache is empty."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Events of one step, in order. `ts` is seconds since the epoch. `prefix` is ours: what became of labels."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None
    prefix: PrefixUpdate | None = None


class KVEventLog:
    """Collects events between steps; runs of the same kind become one event. Token ids are left out unless wanted."""

    def __init__(self, block_size: int, *, tells_tokens: bool = True) -> None:
        self._block_size = block_size
        self._tells_tokens = tells_tokens
        self._events: list[KVEvent] = []
        self._labels = PrefixLabels(secrets.token_hex(8))

    def stored(
        self,
        keys: list[bytes],
        parent: bytes | None,
        tokens: list[int],
        adapter: str = "",
        medium: str = MEDIUM_DEVICE,
    ) -> None:
        for key in keys:
            self._labels.block_stored(key, medium)
        self._events.append(
            BlockStored(
                block_hashes=keys,
                parent_block_hash=parent,
                token_ids=tokens if self._tells_tokens else [],
                block_size=self._block_size,
                lora_name=adapter or None,
                medium=medium,
            )
        )

    def labelled(self, key: bytes, label: int, media: Collection[str]) -> None:
        """A caller's label belongs to a block that is cached in these tiers."""
        self._labels.attach(key, label, media)

    def removed(self, key: bytes, medium: str = MEDIUM_DEVICE) -> None:
        self._labels.block_removed(key, medium)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes.append(key)
        else:
            self._events.append(BlockRemoved(block_hashes=[key], medium=medium))

    def cleared(self) -> None:
        self._labels.clear()
        self._events.append(AllBlocksCleared())

    def take(self) -> KVEventBatch | None:
        """What happened since the last call, or None."""
        prefix = self._labels.take()
        if not self._events and prefix is None:
            return None
        events, self._events = self._events, []
        return KVEventBatch(ts=time.time(), events=events, prefix=prefix)

    def snapshot(self) -> KVEventBatch:
        """The labelled prefixes that are cached now; call it when nothing is left to take."""
        return KVEventBatch(ts=time.time(), events=[], prefix=self._labels.snapshot())
