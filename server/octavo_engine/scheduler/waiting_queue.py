"""Sequences that wait for KV memory or a place in the batch, best rank first."""

from __future__ import annotations

import heapq

from octavo_engine.scheduler.sequence import Sequence


class WaitingQueue:
    """A heap by rank with O(1) removal by mark; counts what it holds."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, float], int, Sequence]] = []
        self._waiting: dict[str, Sequence] = {}
        self._pushes = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def push(self, seq: Sequence) -> None:
        self._pushes += 1
        self._waiting[seq.request_id] = seq
        self.num_tokens += len(seq.tokens)
        heapq.heappush(self._heap, (seq.rank, self._pushes, seq))

    def pop(self) -> Sequence | None:
        """Take the best sequence, or None when nothing waits."""
        while self._heap:
            seq = heapq.heappop(self._heap)[2]
            if self._waiting.get(seq.request_id) is seq:
                self._drop(seq)
                return seq
        return None

    def remove(self, seq: Sequence) -> None:
        self._drop(seq)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [entry for entry in self._heap if self._waiting.get(entry[2].request_id) is entry[2]]
            heapq.heapify(self._heap)

    def _drop(self, seq: Sequence) -> None:
        del self._waiting[seq.request_id]
        self.num_tokens -= len(seq.tokens)
