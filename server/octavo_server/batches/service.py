"""The files and batches of one replica: its store, and a runner that asks the replica itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from octavo_batches.api import BatchApi
from octavo_batches.errors import StoreError
from octavo_batches.in_process import App, post
from octavo_batches.lines import BatchRequest
from octavo_batches.records import BatchRecord
from octavo_batches.runner import PRIORITY, Answer, BatchRunner, PausedError
from octavo_batches.store import BatchStore, StoreLimits
from octavo_engine.errors import ConfigError
from octavo_server.caller import PRIORITY_HEADER, TENANT_HEADER
from octavo_server.lifecycle import Lifecycle, Phase
from octavo_server.limits import LIMITS


class Batches:
    """Made where a folder is set; raises `ConfigError` for one that cannot be used."""

    def __init__(self, folder: str, lifecycle: Lifecycle) -> None:
        limits = StoreLimits(files=LIMITS.stored_files, open_batches=LIMITS.open_batches, lines=LIMITS.batch_lines)
        try:
            self._store = BatchStore(Path(folder), limits)
        except StoreError as error:
            raise ConfigError(f"batch_folder {error}") from error
        self._lifecycle = lifecycle
        self._app: App | None = None
        self.runner = BatchRunner(self._store, self._ask)
        self.api = BatchApi(self._store, self.runner.start)

    def bind(self, app: App) -> None:
        """Name the application that answers the requests."""
        self._app = app

    async def close(self) -> None:
        """Leave every batch as it is."""
        await self.runner.close()
        await asyncio.to_thread(self._store.close)

    async def _ask(self, record: BatchRecord, request: BatchRequest, on_answer: Callable[[Answer], None]) -> None:
        if self._lifecycle.phase is not Phase.READY or self._app is None:
            raise PausedError
        headers = {PRIORITY_HEADER: str(PRIORITY)}
        if record.tenant:
            headers[TENANT_HEADER] = record.tenant
        await post(self._app, request.url, json.dumps(request.body).encode(), headers, on_answer)
