"""Copies of KV blocks between the device and host memory that the next step must find done."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Direction(enum.Enum):
    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks that move together: destination -> source, so that the last write to a place is the one that counts."""

    direction: Direction
    source_of: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source_of)


class TransferQueue:
    """Copies in the order in which memory was given away and taken, which is the order that keeps them right.

    A block that is evicted and filled anew in one step is first copied out, then overwritten; neighbours of one
    direction are one transfer.
    """

    def __init__(self) -> None:
        self._queue: list[Transfer] = []

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, direction: Direction, source: int, destination: int) -> None:
        if not self._queue or self._queue[-1].direction is not direction:
            self._queue.append(Transfer(direction))
        self._queue[-1].source_of[destination] = source

    def take(self) -> list[Transfer]:
        """What is to be copied now, in order."""
        queue, self._queue = self._queue, []
        return queue
