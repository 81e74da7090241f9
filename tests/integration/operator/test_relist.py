from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from octavo_operator.controller.client import ApiError, Kind, KubeClient
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.kinds import INFERENCE_SERVICE, MODEL_CACHE
from octavo_operator.controller.settings import OperatorSettings


class Lister(KubeClient):
    """A client whose lists the test writes."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self.services: list[dict[str, Any]] = []
        self.during: Callable[[], None] = lambda: None  # what happens while a list is under way
        self.refused: Kind | None = None

    async def list_objects(self, kind: Kind, namespace: str | None = None, selector: str = "") -> dict[str, Any]:
        if kind == self.refused:
            raise ApiError(f"LIST {kind.plural}", 403, "forbidden")
        items = self.services if kind == INFERENCE_SERVICE else []
        self.during()
        return {"metadata": {"resourceVersion": "9"}, "items": items}


def service(name: str, version: str = "1") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "team", "resourceVersion": version}, "spec": {}}


Room = tuple[EngineRoom, Lister, list[tuple[str, str]]]


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    async with aiohttp.ClientSession() as session:
        client = Lister(session)
        room = EngineRoom(client, OperatorSettings())
        woken: list[tuple[str, str]] = []
        room.services.add = woken.append  # type: ignore[method-assign]
        for name in ("same", "gone"):
            room.see(INFERENCE_SERVICE, service(name), deleted=False)
        woken.clear()
        yield room, client, woken


async def test_what_a_silent_watch_did_not_tell_is_taken_up_by_listing_anew(room: Room) -> None:
    subject, client, woken = room
    client.services = [service("same"), service("new")]
    await subject.relist()
    assert sorted(woken) == [("team", "gone"), ("team", "new")]
    assert sorted(o["metadata"]["name"] for o in subject.store.all(INFERENCE_SERVICE)) == ["new", "same"]
    woken.clear()
    client.services = [service("same", "2"), service("new")]
    await subject.relist()
    assert woken == [("team", "same")]


async def test_what_the_watch_tells_while_a_list_is_under_way_is_newer_than_the_list(room: Room) -> None:
    subject, client, _ = room
    client.services = [service("same", "2"), service("gone")]

    def meanwhile() -> None:
        subject.see(INFERENCE_SERVICE, service("same", "3"), deleted=False)
        subject.see(INFERENCE_SERVICE, service("made", "3"), deleted=False)

    client.during = meanwhile
    await subject.relist()
    versions = {o["metadata"]["name"]: o["metadata"]["resourceVersion"] for o in subject.store.all(INFERENCE_SERVICE)}
    assert versions == {"same": "3", "made": "3", "gone": "1"}


async def test_a_kind_that_may_not_be_listed_makes_the_operator_unhealthy_but_stops_no_other(room: Room) -> None:
    subject, client, woken = room
    subject._listed_at -= 200  # the last full list is long ago
    client.refused, client.services = MODEL_CACHE, [service("new")]
    with pytest.raises(ApiError, match="403"):
        await subject.relist()
    assert ("team", "new") in woken
    assert subject.silence_s() >= 200
    client.refused = None
    await subject.relist()
    assert subject.silence_s() < 200
