"""Keep the store in step with the cluster: list, then watch; on any doubt, list again."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from octavo_operator.controller.client import ApiError, Kind, KubeClient, Object
from octavo_operator.controller.store import Store

log = logging.getLogger("octavo.operator.informer")
BACK_OFF_MAX_S = 30.0


class Informer:
    """Watches one kind by label. `on_change` hears every object that came, changed or went."""

    def __init__(
        self,
        client: KubeClient,
        store: Store,
        kind: Kind,
        selector: str,
        on_change: Callable[[Kind, Object], None],
        namespace: str | None = None,
    ) -> None:
        self.kind = kind
        self._client = client
        self._store = store
        self._selector = selector
        self._on_change = on_change
        self._namespace = namespace
        self.synced = asyncio.Event()
        self.last_contact = time.monotonic()  # when the API server last said anything

    def silence_s(self) -> float:
        """Seconds since the API server last answered; grows without bound when the watch has died."""
        return time.monotonic() - self.last_contact

    async def run(self) -> None:
        """Run until cancelled."""
        failures = 0
        while True:
            try:
                version = await self._list()
                failures = 0
                await self._watch(version)
            except ApiError as error:
                failures += error.status != 410
                pause = min(BACK_OFF_MAX_S, 0.5 * 2**failures) * random.uniform(0.5, 1.0)  # noqa: S311
                level = logging.INFO if error.status == 410 or failures < 2 else logging.WARNING
                log.log(level, "watch of %s ended: %s; listing again in %.1f s", self.kind.plural, error, pause)
                await asyncio.sleep(pause)

    async def _list(self) -> str:
        answer = await self._client.list_objects(self.kind, self._namespace, self._selector)
        items = answer.get("items") or []
        for item in items:
            item.setdefault("apiVersion", self.kind.api_version)
            item.setdefault("kind", self.kind.kind)
        gone = self._store.replace(self.kind, items, self._namespace)
        self.last_contact = time.monotonic()
        self.synced.set()
        for obj in (*gone, *items):
            self._on_change(self.kind, obj)
        return str(answer["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> None:
        """Follow changes until a stream fails; a stream that the server ends in order is simply opened again."""
        while True:
            async for event, obj in self._client.watch(self.kind, self._namespace, self._selector, version):
                self.last_contact = time.monotonic()
                version = obj["metadata"]["resourceVersion"]
                if event == "BOOKMARK":
                    continue
                if event == "DELETED":
                    self._store.remove(self.kind, obj)
                else:
                    self._store.put(self.kind, obj)
                self._on_change(self.kind, obj)
