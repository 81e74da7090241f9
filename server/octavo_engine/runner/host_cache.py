"""KV blocks in host memory, and the copies to and from the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from octavo_engine.kv.transfers import Direction, Transfer
from octavo_kernels.batch import PagedKVCache

_AT_ONCE = 64  # blocks; bounds the memory that a copy takes on the device


class HostCache:
    """One host cache for each layer, laid out as the device's.

    Scattered blocks are gathered where they lie and cross the bus in one piece.
    """

    def __init__(self, layers: Sequence[PagedKVCache]) -> None:
        self._layers = layers

    def move(self, transfer: Transfer, device_layers: Sequence[PagedKVCache]) -> None:
        """Copy blocks; returns once they are there."""
        destinations, sources = list(transfer.source_of), list(transfer.source_of.values())
        for host, device in zip(self._layers, device_layers, strict=True):
            to_host = transfer.direction is Direction.TO_HOST
            source, destination = (device, host) if to_host else (host, device)
            for first in range(0, len(sources), _AT_ONCE):
                part = slice(first, first + _AT_ONCE)
                _copy(source, destination, sources[part], destinations[part])


def _copy(source: PagedKVCache, destination: PagedKVCache, sources: list[int], destinations: list[int]) -> None:
    read = torch.tensor(sources, device=source.device)
    write = torch.tensor(destinations, device=destination.device)
    for old, new in zip(_tensors(source), _tensors(destination), strict=True):
        gathered = old.view(_BYTES[old.element_size()]).index_select(0, read).to(destination.device)
        new.view(gathered.dtype).index_copy_(0, write, gathered)


# Indexing is not there for every number format (float8), but for integers of any width.
_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _tensors(cache: PagedKVCache) -> Iterator[torch.Tensor]:
    for tensor in (cache.key, cache.value, cache.key_scale, cache.value_scale):
        if tensor is not None:
            yield tensor
