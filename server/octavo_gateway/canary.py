"""A canary's share of a model's requests, and how both tracks fare. Used from one event loop."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Sequence

from octavo_gateway.registry import Endpoint, ModelEntry
from octavo_gateway.routing import Candidate

FIRST_BYTE_BOUNDS_S = tuple(round(0.005 * 1.15**step, 4) for step in range(68))
"""15 % apart, from 5 ms to a minute: fine enough to see a median grow by a fifth."""


class Track(enum.StrEnum):
    """Which revision of a model: the one that serves, or the one on trial."""

    STABLE = "stable"
    CANARY = "canary"


def track_of(endpoint: Endpoint) -> Track:
    """The track that a replica belongs to."""
    return Track.CANARY if endpoint.canary else Track.STABLE


class TrackRecord:
    """Counts of one track since the gateway started; only attempts made while a canary ran."""

    __slots__ = ("buckets", "errors", "requests", "seconds")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.buckets = [0] * (len(FIRST_BYTE_BOUNDS_S) + 1)  # the last one holds what is slower than every bound
        self.seconds = 0.0

    def first_byte(self, seconds: float) -> None:
        """A replica of this track began to answer."""
        self.buckets[bisect_left(FIRST_BYTE_BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    def ended(self, *, failed: bool) -> None:
        """An attempt ended, by the replica's fault or well."""
        self.requests += 1
        self.errors += failed


class CanaryShare:
    """One model's split. The canary never gets more than its weight of the requests, and no less than it has room
    for, unless no other replica is ready at all."""

    __slots__ = ("_due", "tracks")

    def __init__(self) -> None:
        self._due = 0.0  # requests that the canary may get now, a fraction
        self.tracks = {track: TrackRecord() for track in Track}

    def offer(self, entry: ModelEntry, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """The candidates that the next request may go to; none when it should wait for a replica of its track."""
        weight = entry.canary_weight
        if weight is None:
            return candidates
        canary = [c for c in candidates if c.endpoint.canary]
        if canary and self._due + weight / 100 >= 1.0:
            return canary
        stable = [c for c in candidates if not c.endpoint.canary]
        if stable or any(not endpoint.canary for endpoint in entry.ready):
            return stable
        return canary

    def granted(self, entry: ModelEntry, endpoint: Endpoint) -> None:
        """A request went to this replica."""
        if entry.canary_weight is not None:
            due = self._due + entry.canary_weight / 100 - (1.0 if endpoint.canary else 0.0)
            self._due = min(max(due, 0.0), 1.0)
