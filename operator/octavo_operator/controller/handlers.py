"""kopf handlers: each a few lines that hand what kopf saw to the engine room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import kopf

from octavo_operator.api.base import GROUP, VERSION
from octavo_operator.controller.client import Kind
from octavo_operator.controller.credentials import connect, find_cluster
from octavo_operator.controller.engine_room import OWN_KINDS, EngineRoom
from octavo_operator.controller.settings import OperatorSettings

log = logging.getLogger("octavo.operator")


def build_registry(
    settings: OperatorSettings,
    on_room: Callable[[EngineRoom], None] = lambda room: None,
    may_write: Callable[[], bool] = lambda: True,
) -> kopf.OperatorRegistry:
    """The handlers of one operator. `on_room` hears of the engine room once it exists; `may_write` is its fence."""
    registry = kopf.OperatorRegistry()
    room: EngineRoom | None = None
    task: asyncio.Task[None] | None = None

    @kopf.on.login(registry=registry)  # type: ignore[untyped-decorator]
    def login(**_: Any) -> kopf.ConnectionInfo:
        return find_cluster()

    @kopf.on.startup(registry=registry)  # type: ignore[untyped-decorator]
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        nonlocal room, task
        _configure(settings)
        room = EngineRoom(connect(find_cluster(), may_write), own)
        task = asyncio.create_task(room.run())
        on_room(room)

    @kopf.on.cleanup(registry=registry)  # type: ignore[untyped-decorator]
    async def stop(**_: Any) -> None:
        if task is not None and room is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await room.client.close()

    def watch(kind: Kind) -> None:
        @kopf.on.event(GROUP, VERSION, kind.plural, registry=registry, id=f"see-{kind.plural}")  # type: ignore[untyped-decorator]
        async def see(event: Any, body: Any, **_: Any) -> None:
            if room is not None:
                room.see(kind, dict(body), deleted=event["type"] == "DELETED")

    own = settings
    for kind in OWN_KINDS:
        watch(kind)
    return registry


def _configure(settings: kopf.OperatorSettings) -> None:
    """kopf shall watch and nothing else: no Events of its own, no annotations, no finalizers, no webhooks."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
