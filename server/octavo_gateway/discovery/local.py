"""Discovery for local mode: the program that supervises the replicas tells about them directly."""

from __future__ import annotations

from collections.abc import Sequence

from octavo_gateway.registry import ModelEntry, Registry


class LocalDiscovery:
    """Publishes what the supervisor says. Call it from the gateway's event loop."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._entries: tuple[ModelEntry, ...] | None = None

    def set_models(self, entries: Sequence[ModelEntry]) -> None:
        """Replace the full view; saying the same again costs nothing."""
        entries = tuple(entries)
        if entries != self._entries:
            self._entries = entries
            self._registry.publish(entries)
