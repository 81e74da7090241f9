"""Bring a ModelCache to its wanted state: the claim and its one download; a failed download is begun anew later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.api.validation import parse
from octavo_operator.controller.client import KubeClient, Object
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.kinds import CLAIM, JOB, MODEL_CACHE, POD, kind_of
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Key, Store
from octavo_operator.diff import identity, stamped
from octavo_operator.model_cache_status import cache_status, failed_at
from octavo_operator.plan import Facts
from octavo_operator.render import Owner
from octavo_operator.render.model_cache import CACHE_LABEL, render_model_cache

log = logging.getLogger("octavo.operator.cache")
RESYNC_S = 300.0


class ModelCacheReconciler:
    """The only writer of what model caches own and of their status."""

    def __init__(
        self,
        client: KubeClient,
        store: Store,
        events: EventRecorder,
        settings: OperatorSettings,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._store = store
        self._events = events
        self._settings = settings
        self._now = now

    async def reconcile(self, key: Key) -> float | None:
        """One look at a cache. Returns after how many seconds to look again."""
        raw = self._store.get(MODEL_CACHE, *key)
        if raw is None or raw["metadata"].get("deletionTimestamp"):
            return None
        try:
            cache = parse(ModelCache, raw)
        except ManifestErrors as wrong:
            log.warning("ModelCache %s/%s is not valid: %s", *key, wrong)
            return None
        job, again_s = await self._apply(raw, cache)
        claim = self._store.get(CLAIM, key[0], f"{cache.metadata.name}-model")
        pods = list(self._store.labelled(POD, key[0], CACHE_LABEL, key[1]))
        await self._write_status(raw, cache_status(cache, job, claim, pods, self._now()))
        return again_s

    async def _apply(self, raw: Object, cache: ModelCache) -> tuple[Object | None, float]:
        """Create what is absent. Claims and Jobs are never changed afterwards: the API server forbids it."""
        owner = Owner("ModelCache", cache.metadata.name, raw["metadata"]["uid"])
        job: Object | None = None
        again_s = RESYNC_S
        for obj in stamped(_owned(render_model_cache(cache, Facts(engine_image=self._settings.engine_image)), owner)):
            kind = kind_of(obj)
            _, _, namespace, name = identity(obj)
            found = self._store.get(kind, namespace, name)
            if found is None:
                found = await self._client.apply(kind, obj)
                self._store.put(kind, found)
                log.info("applied %s %s/%s", kind.kind, namespace, name)
            if kind == JOB:
                job = found
                again_s = await self._retry(found, cache) or RESYNC_S
        return job, again_s

    async def _retry(self, job: Object, cache: ModelCache) -> float | None:
        """Delete a Job that failed long enough ago, so that a new one begins; returns how long that still takes."""
        failed = failed_at(job)
        if failed is None:
            return None
        left = failed + cache.spec.ttl_seconds_after_failure - self._now()
        if left > 0:
            return left + 1
        metadata = job["metadata"]
        await self._client.delete(JOB, metadata["namespace"], metadata["name"], metadata["uid"])
        self._store.remove(JOB, job)
        return 1.0

    async def _write_status(self, raw: Object, status: dict[str, Any]) -> None:
        if raw.get("status") == status:
            return
        metadata = raw["metadata"]
        answer = await self._client.patch_status(MODEL_CACHE, metadata["namespace"], metadata["name"], status)
        self._store.put(MODEL_CACHE, answer)
        old = (raw.get("status") or {}).get("phase")
        if old != status["phase"] and status["phase"] in ("Ready", "Failed"):
            (condition,) = status["conditions"]
            await self._events.tell(
                raw,
                condition["reason"],
                condition["message"] or "the model is there",
                warning=status["phase"] == "Failed",
            )


def _owned(objects: list[Object], owner: Owner) -> list[Object]:
    return [{**o, "metadata": {**o["metadata"], "ownerReferences": [owner.reference()]}} for o in objects]
