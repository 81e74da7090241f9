from __future__ import annotations

from typing import Any

import aiohttp

from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.settings import OperatorSettings


class Lister(KubeClient):
    """A client whose lists the test writes."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self.services: list[dict[str, Any]] = []

    async def list_objects(self, kind: Kind, namespace: str | None = None, selector: str = "") -> dict[str, Any]:
        items = self.services if kind == INFERENCE_SERVICE else []
        return {"metadata": {"resourceVersion": "9"}, "items": items}


def service(name: str, version: str = "1") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "team", "resourceVersion": version}, "spec": {}}


async def test_what_a_silent_watch_did_not_tell_is_taken_up_by_listing_anew() -> None:
    async with aiohttp.ClientSession() as session:
        client = Lister(session)
        room = EngineRoom(client, OperatorSettings())
        woken: list[tuple[str, str]] = []
        room.services.add = woken.append  # type: ignore[method-assign]
        for name in ("same", "gone"):
            room.see(INFERENCE_SERVICE, service(name), deleted=False)
        woken.clear()
        client.services = [service("same"), service("new")]
        await room.relist()
        assert sorted(woken) == [("team", "gone"), ("team", "new")]
        assert sorted(o["metadata"]["name"] for o in room.store.all(INFERENCE_SERVICE)) == ["new", "same"]
        woken.clear()
        client.services = [service("same", "2"), service("new")]
        await room.relist()
        assert woken == [("team", "same")]
