"""One replica's events in order: finds gaps and restarts, and joins a snapshot with what came meanwhile. Pure."""

from __future__ import annotations

import enum

from octavo_gateway.cache_events.wire import Event, Update

MAX_BUFFERED = 1_000
"""Events kept while a snapshot is under way; with more the next snapshot is asked for."""


class Resync(enum.StrEnum):
    """Why what is known of a replica must be asked for anew."""

    START = "start"
    GAP = "gap"
    RESTART = "restart"
    MALFORMED = "malformed"


class CacheFeed:
    """Turns events into updates that follow each other without a hole.

    `needs` says why a snapshot is wanted; until it comes, events are kept, and what was known before still stands.
    """

    def __init__(self) -> None:
        self.needs: Resync | None = Resync.START
        self._engine = ""
        self._next_number = 0
        self._buffer: list[Event] = []

    def push(self, event: Event) -> Update | None:
        """The next event as published; an update to apply, or None."""
        if self.needs is not None:
            if len(self._buffer) >= MAX_BUFFERED:
                self._buffer.clear()
            self._buffer.append(event)
            return None
        if event.update is not None and event.update.engine != self._engine:
            self._wait_for_snapshot(Resync.RESTART, event)
            return None
        if event.number < self._next_number:
            return None  # the snapshot, which came by another socket, was ahead of it
        if event.number > self._next_number:
            self._wait_for_snapshot(Resync.GAP, event)
            return None
        self._next_number += 1
        return event.update

    def malformed(self) -> None:
        """A message could not be read: whatever it said is missing now."""
        self.needs = self.needs or Resync.MALFORMED

    def snapshot(self, number: int, state: Update) -> list[Update]:
        """The state before event `number`, and what came since; empty, and `needs` stays set, if some is missing."""
        buffered, self._buffer = self._buffer, []
        updates, engine = [state], state.engine
        for event in buffered:
            if event.number < number:
                continue
            if event.number > number or (event.update is not None and event.update.engine != engine):
                return []
            number += 1
            if event.update is not None:
                updates.append(event.update)
        self._engine, self._next_number, self.needs = engine, number, None
        return updates

    def _wait_for_snapshot(self, why: Resync, event: Event) -> None:
        self.needs = why
        self._buffer.append(event)
