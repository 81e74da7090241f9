"""Faults that a real API server cannot be made to give on demand, scripted with kmock (which is no API server)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import kmock as km
import pytest

from octavo_operator.controller import client as client_module
from octavo_operator.controller.client import ApiError, KubeClient
from octavo_operator.controller.informer import Informer
from octavo_operator.controller.kinds import DEPLOYMENT, INFERENCE_SERVICE, LEASE
from octavo_operator.controller.leader import LeaderElection
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store

pytestmark = pytest.mark.kmock(cls=km.RawHandler)
DEPLOYMENTS = "/apis/apps/v1/deployments"
ONE = "/apis/apps/v1/namespaces/team/deployments/chat"
TOO_OLD = b'{"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}\n'
LEASES = "/apis/coordination.k8s.io/v1/namespaces/octavo-system/leases"


@pytest.fixture
async def client(kmock: Any) -> AsyncIterator[KubeClient]:
    session = aiohttp.ClientSession()
    yield KubeClient(str(kmock.url), session)
    await session.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts are noted, not slept."""
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    return pauses


def failure(code: int, message: str = "no") -> km.Response:
    return km.Response(status=code, payload={"kind": "Status", "code": code, "message": message, "reason": "R"})


def obj(name: str = "chat", **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "team", "resourceVersion": "5", **metadata},
    }


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_a_busy_server_is_asked_again(kmock: Any, client: KubeClient, code: int) -> None:
    kmock["patch", ONE][:2] << failure(code)
    kmock["patch", ONE] << obj()
    assert (await client.apply(DEPLOYMENT, obj()))["metadata"]["name"] == "chat"


async def test_retry_after_is_obeyed(kmock: Any, client: KubeClient, quick: list[float]) -> None:
    kmock["get", ONE][:1] << km.Response(status=429, payload={"message": "slow"}, headers={"Retry-After": "7"})
    kmock["get", ONE] << obj()
    await client.get(DEPLOYMENT, "team", "chat")
    assert quick == [pytest.approx(7, rel=0.25)]


async def test_a_server_that_stays_busy_is_given_up_with_the_call_and_its_words(kmock: Any, client: KubeClient) -> None:
    kmock["get", ONE] << failure(503, "etcd is away")
    with pytest.raises(ApiError, match=r"GET .*deployments/chat: 503: etcd is away"):
        await client.get(DEPLOYMENT, "team", "chat")


@pytest.mark.parametrize(("code", "refusal"), [(403, True), (409, False), (422, True)])
async def test_an_answer_that_will_not_change_is_not_asked_for_again(
    kmock: Any, client: KubeClient, quick: list[float], code: int, refusal: bool
) -> None:
    kmock["patch", ONE] << failure(code)
    with pytest.raises(ApiError) as caught:
        await client.apply(DEPLOYMENT, obj())
    assert caught.value.status == code
    assert caught.value.is_refusal is refusal
    assert quick == []


async def test_deleting_what_is_gone_succeeds(kmock: Any, client: KubeClient) -> None:
    kmock["delete", ONE] << failure(404)
    await client.delete(DEPLOYMENT, "team", "chat")


async def test_an_unreachable_server_says_so() -> None:
    async with aiohttp.ClientSession() as session:
        client = KubeClient("http://127.0.0.1:9", session)
        with pytest.raises(ApiError, match="unreachable"):
            await client.get(INFERENCE_SERVICE, "team", "chat")


async def informed(kmock: Any, client: KubeClient, lists: int) -> tuple[Store, int]:
    """Run an informer until it has listed so often; returns its store and the number of lists."""
    store, seen = Store(), 0
    listed = asyncio.Event()
    original = store.replace

    def replace(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen >= lists:
            listed.set()
        return original(*args)

    store.replace = replace  # type: ignore[method-assign]
    informer = Informer(client, store, DEPLOYMENT, "", lambda kind, obj: None)
    task = asyncio.create_task(informer.run())
    try:
        await asyncio.wait_for(listed.wait(), 10)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return store, seen


async def test_a_version_that_is_too_old_leads_to_a_new_list(kmock: Any, client: KubeClient) -> None:
    kmock["get", DEPLOYMENTS, km.params({"watch": "true"})] << TOO_OLD
    kmock["get", DEPLOYMENTS] << {"metadata": {"resourceVersion": "7"}, "items": [obj()]}
    store, lists = await informed(kmock, client, lists=2)
    assert lists >= 2
    assert [o["metadata"]["name"] for o in store.all(DEPLOYMENT)] == ["chat"]


async def test_a_list_that_fails_is_tried_again(kmock: Any, client: KubeClient) -> None:
    kmock["get", DEPLOYMENTS, km.params({"watch": "true"})] << []
    kmock["get", DEPLOYMENTS][:1] << failure(403, "not yet")
    kmock["get", DEPLOYMENTS] << {"metadata": {"resourceVersion": "7"}, "items": [obj()]}
    store, _ = await informed(kmock, client, lists=1)
    assert len(store.all(DEPLOYMENT)) == 1


async def test_what_vanished_while_the_watch_was_down_is_forgotten(kmock: Any, client: KubeClient) -> None:
    kmock["get", DEPLOYMENTS, km.params({"watch": "true"})] << TOO_OLD
    kmock["get", DEPLOYMENTS][:1] << {"metadata": {"resourceVersion": "7"}, "items": [obj(), obj("gone")]}
    kmock["get", DEPLOYMENTS] << {"metadata": {"resourceVersion": "9"}, "items": [obj()]}
    store, _ = await informed(kmock, client, lists=2)
    assert [o["metadata"]["name"] for o in store.all(DEPLOYMENT)] == ["chat"]


def lease(holder: str, renew: str = "t0") -> dict[str, Any]:
    return {
        "metadata": {"name": "octavo-operator", "namespace": "octavo-system", "resourceVersion": "1"},
        "spec": {"holderIdentity": holder, "renewTime": renew, "leaseDurationSeconds": 15},
    }


def election(client: KubeClient) -> LeaderElection:
    return LeaderElection(client, OperatorSettings(identity="me"))


async def test_an_absent_lease_is_taken(kmock: Any, client: KubeClient) -> None:
    kmock["get", f"{LEASES}/octavo-operator"] << failure(404)
    kmock["post", LEASES] << {}
    assert await election(client)._try() is True


async def test_a_lease_that_another_takes_first_is_not_ours(kmock: Any, client: KubeClient) -> None:
    kmock["get", f"{LEASES}/octavo-operator"] << lease("")
    kmock["put", f"{LEASES}/octavo-operator"] << failure(409)
    assert await election(client)._try() is False


async def test_a_lease_is_taken_over_only_when_its_holder_is_silent_for_its_whole_duration(
    kmock: Any, client: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    kmock["get", f"{LEASES}/octavo-operator"] << lease("other")
    kmock["put", f"{LEASES}/octavo-operator"] << {}
    clock = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    me = election(client)
    assert await me._try() is False
    clock[0] += 10
    assert await me._try() is False
    clock[0] += 6
    assert await me._try() is True


async def test_a_server_that_does_not_answer_leaves_the_question_open(kmock: Any, client: KubeClient) -> None:
    kmock["get", f"{LEASES}/octavo-operator"] << failure(503)
    assert await election(client)._try() is None
    assert LEASE.plural == "leases"


async def test_who_lost_the_lease_in_its_sleep_writes_nothing_when_it_wakes(
    kmock: Any, client: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence is in the client: no task that was under way slips a write past it, and reading stays allowed."""
    kmock["get", f"{LEASES}/octavo-operator"] << failure(404)
    kmock["post", LEASES] << {}
    kmock["get", ONE] << obj()
    kmock["delete", ONE] << {}
    clock = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    me = election(client)
    fenced = KubeClient(str(kmock.url), client._session, may_write=me.leads)
    with pytest.raises(ApiError, match="does not hold the lease"):
        await fenced.delete(DEPLOYMENT, "team", "chat")
    await me.acquire()
    await fenced.delete(DEPLOYMENT, "team", "chat")
    clock[0] += 11  # a standby takes over after 15 s of silence at the earliest
    with pytest.raises(ApiError, match="does not hold the lease"):
        await fenced.delete(DEPLOYMENT, "team", "chat")
    assert (await fenced.get(DEPLOYMENT, "team", "chat"))["metadata"]["name"] == "chat"
    assert len(kmock["delete", ONE]) == 1
