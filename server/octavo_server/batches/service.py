"""The store and the runner of one replica's batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo_server.batches.runner import BatchRunner
from octavo_server.batches.store import BatchStore
from octavo_server.lifecycle import Lifecycle


@dataclass(frozen=True, slots=True)
class Batches:
    """What the routes need; made where a folder is set."""

    store: BatchStore
    runner: BatchRunner

    @classmethod
    def open(cls, folder: str | None, lifecycle: Lifecycle) -> Batches | None:
        """Raises `ConfigError` for a folder that cannot be used."""
        if folder is None:
            return None
        store = BatchStore(Path(folder))
        return cls(store, BatchRunner(store, lifecycle))
