"""Kubernetes Events, without spam: the same news about the same object is told once an hour."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from octavo_operator.controller.client import ApiError, KubeClient
from octavo_operator.controller.kinds import EVENT
from octavo_operator.judgement import timestamp

log = logging.getLogger("octavo.operator.events")
REPEAT_AFTER_S = 3_600.0
MAX_REMEMBERED = 10_000
MAX_NOTE = 1_000


class EventRecorder:
    """Writes Events; a failure to write one is logged and forgotten."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._told: dict[tuple[str, str, str], float] = {}

    async def tell(self, obj: dict[str, Any], reason: str, note: str, *, warning: bool = False) -> None:
        """Record an Event about an object, unless it was told within the hour."""
        metadata = obj["metadata"]
        key = (metadata.get("uid", metadata["name"]), reason, note)
        now = time.monotonic()
        if now - self._told.get(key, -REPEAT_AFTER_S) < REPEAT_AFTER_S:
            return
        if len(self._told) >= MAX_REMEMBERED:
            self._told.clear()
        self._told[key] = now
        try:
            await self._client.create(EVENT, self._event(obj, reason, note, warning))
        except ApiError as error:
            log.info("event %s about %s was not written: %s", reason, metadata["name"], error)

    @staticmethod
    def _event(obj: dict[str, Any], reason: str, note: str, warning: bool) -> dict[str, Any]:
        metadata = obj["metadata"]
        namespace = metadata.get("namespace") or "default"
        time_now = timestamp(time.time())
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": obj["apiVersion"],
                "kind": obj["kind"],
                "name": metadata["name"],
                "namespace": namespace,
                "uid": metadata.get("uid", ""),
            },
            "reason": reason,
            "message": note[:MAX_NOTE],
            "type": "Warning" if warning else "Normal",
            "source": {"component": "octavo-operator"},
            "firstTimestamp": time_now,
            "lastTimestamp": time_now,
            "count": 1,
        }
