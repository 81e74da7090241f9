"""Events lost, doubled and out of order, calls that fail, a user who edits meanwhile: the end is always the same.

The cluster is a dictionary; what is tested is that nothing the operator does depends on the order in which it hears.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import aiohttp
import pytest

from octavo_operator.controller.client import ApiError, Kind, KubeClient
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.kinds import CHILDREN, DEPLOYMENT, INFERENCE_SERVICE
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import key_of

Place = tuple[Kind, str, str]
NAMES = ("a", "b", "c")
LOST, DOUBLED, REFUSED = 0.3, 0.2, 0.1


class Cluster(KubeClient):
    """Objects by place; every write is an event that the test delivers as it likes. `dice` None: nothing fails."""

    def __init__(self, session: aiohttp.ClientSession, dice: random.Random | None) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self.objects: dict[Place, dict[str, Any]] = {}
        self.events: list[tuple[Kind, dict[str, Any], bool]] = []
        self._dice = dice
        self._version = 0

    def put(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        stored = copy.deepcopy(obj)
        metadata = stored["metadata"]
        place = (kind, metadata.get("namespace") or "", metadata["name"])
        former = self.objects.get(place, {"metadata": {}})
        metadata["uid"] = former["metadata"].get("uid", f"uid-{self._version}")
        metadata["resourceVersion"] = str(self._version)
        self.objects[place] = stored
        self.events.append((kind, copy.deepcopy(stored), False))
        return stored

    def remove(self, place: Place) -> None:
        gone = self.objects.pop(place, None)
        if gone is not None:
            self.events.append((place[0], gone, True))

    def collect(self) -> None:
        """What the garbage collector does: whatever has an owner that does not exist goes, also if it came later."""
        alive = {obj["metadata"]["uid"] for obj in self.objects.values()}
        for place, obj in list(self.objects.items()):
            owners = {owner["uid"] for owner in obj["metadata"].get("ownerReferences") or []}
            if owners and not owners & alive:
                self.remove(place)

    async def list_objects(self, kind: Kind, namespace: str | None = None, selector: str = "") -> dict[str, Any]:
        found = [o for (k, n, _), o in self.objects.items() if k == kind and namespace in (None, n)]
        return {"metadata": {"resourceVersion": str(self._version)}, "items": copy.deepcopy(found)}

    async def apply(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]:
        self._may_fail("PATCH")
        self.writes += 1
        return copy.deepcopy(self.put(kind, obj))

    async def delete(self, kind: Kind, namespace: str | None, name: str, uid: str | None = None) -> None:
        self._may_fail("DELETE")
        self.writes += 1
        self.remove((kind, namespace or "", name))

    async def patch_status(
        self, kind: Kind, namespace: str | None, name: str, status: dict[str, Any]
    ) -> dict[str, Any]:
        self._may_fail("PATCH")
        found = self.objects.get((kind, namespace or "", name))
        if found is None:
            raise ApiError("PATCH status", 404, "gone")
        return copy.deepcopy(self.put(kind, {**found, "status": status}))

    async def create(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]:
        return obj  # Events only

    def _may_fail(self, call: str) -> None:
        if self._dice is not None and self._dice.random() < REFUSED:
            raise ApiError(call, 0, "the connection broke")


class World:
    """A cluster, an engine room that hears of it, and the keys that wait to be reconciled."""

    def __init__(self, session: aiohttp.ClientSession, dice: random.Random | None) -> None:
        self.cluster = Cluster(session, dice)
        self.room = EngineRoom(self.cluster, OperatorSettings())
        self.waiting: set[tuple[str, str]] = set()
        self.room.services.add = self.waiting.add  # type: ignore[method-assign]
        self._dice = dice

    def act(self, dice: random.Random) -> None:
        """The user writes or deletes a service, or edits or deletes what one made."""
        name, what = dice.choice(NAMES), dice.random()
        children = [place for place in self.cluster.objects if place[0] in CHILDREN]
        if what < 0.5 or not children:
            self.cluster.put(INFERENCE_SERVICE, service(name, dice.choice([16, 32]), dice.random() < 0.5))
        elif what < 0.65:
            self.cluster.remove((INFERENCE_SERVICE, "team", name))
        elif what < 0.85:
            self.cluster.remove(dice.choice(children))
        else:
            drifted = copy.deepcopy(self.cluster.objects[dice.choice(children)])
            drifted["metadata"]["labels"]["app.kubernetes.io/name"] = "edited"
            place = next(
                p for p, o in self.cluster.objects.items() if o["metadata"]["uid"] == drifted["metadata"]["uid"]
            )
            self.cluster.put(place[0], drifted)

    def deliver(self, dice: random.Random) -> None:
        """Some of the events, in any order; some twice, some never."""
        self.cluster.collect()
        dice.shuffle(self.cluster.events)
        for kind, obj, deleted in self.cluster.events:
            for _ in range((dice.random() > LOST) * (1 + (dice.random() < DOUBLED))):
                self._hear(kind, obj, deleted)
        self.cluster.events.clear()

    def _hear(self, kind: Kind, obj: dict[str, Any], deleted: bool) -> None:
        if kind == INFERENCE_SERVICE:
            self.room.see(kind, copy.deepcopy(obj), deleted)
        elif deleted:
            self.room.store.remove(kind, obj)
            self.room._child_changed(kind, obj)
        else:
            self.room.store.put(kind, copy.deepcopy(obj))
            self.room._child_changed(kind, obj)

    async def reconcile(self, share: float = 1.0) -> None:
        """Some of the waiting keys; those that fail wait on."""
        for key in sorted(self.waiting):
            if self._dice is not None and self._dice.random() > share:
                continue
            self.waiting.discard(key)
            try:
                await self.room.reconciler.reconcile(key)
            except ApiError:
                self.waiting.add(key)

    async def settle(self) -> None:
        """What the regular lists bring: everything is seen anew, until nothing is left to do."""
        for _ in range(60):
            self.cluster.collect()
            self.cluster.events.clear()
            for informer in self.room.informers:
                await informer._list()
            await self.room.relist()
            before = self.cluster.writes
            self.waiting |= {key_of(o) for o in self.room.store.all(INFERENCE_SERVICE)}
            await self.reconcile()
            if not self.waiting and self.cluster.writes == before:
                return
        pytest.fail("it never settles")

    def state(self) -> dict[Place, Any]:
        """Everything but what differs from run to run."""
        return {place: _timeless(obj) for place, obj in self.cluster.objects.items()}


def _timeless(obj: dict[str, Any]) -> dict[str, Any]:
    metadata = {k: v for k, v in obj["metadata"].items() if k in ("name", "namespace", "labels", "annotations")}
    metadata["annotations"] = {k: v for k, v in (metadata.get("annotations") or {}).items() if "applied" not in k}
    return {**{k: v for k, v in obj.items() if k != "status"}, "metadata": metadata}


def service(name: str, sequences: int, autoscaled: bool) -> dict[str, Any]:
    spec: dict[str, Any] = {"model": {"storageUri": "hf://org/model"}, "engine": {"maxNumSeqs": sequences}}
    spec |= {"autoscaling": {"maxReplicas": 2}} if autoscaled else {"replicas": 2}
    return {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.kind,
        "metadata": {"name": name, "namespace": "team", "generation": 1},
        "spec": spec,
    }


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 25))])
async def test_whatever_is_heard_in_whatever_order_the_end_is_the_same(block: int) -> None:
    async with aiohttp.ClientSession() as session:
        for seed in range(20 * block, 20 * block + 20):
            dice = random.Random(seed)
            world = World(session, dice)
            for _ in range(12):
                world.act(dice)
                if dice.random() < 0.7:
                    world.deliver(dice)
                await world.reconcile(share=0.7)
            await world.settle()

            calm = World(session, None)
            for place, obj in world.cluster.objects.items():
                if place[0] == INFERENCE_SERVICE:
                    calm.cluster.put(INFERENCE_SERVICE, {**obj, "metadata": {**obj["metadata"]}})
            await calm.settle()
            # The number of an autoscaled service is its history's; all else is a function of the specs alone.
            assert _without_replicas(world.state()) == _without_replicas(calm.state()), f"seed {seed}"


def _without_replicas(state: dict[Place, Any]) -> dict[Place, Any]:
    for (kind, _, _), obj in state.items():
        if kind == DEPLOYMENT:
            obj["spec"] = {k: v for k, v in obj["spec"].items() if k != "replicas"}
    return state
