"""A changed service with spec.rollout.canary, from the edit to the end: through the reconciler and what it applies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from fakes.small_cluster import SmallCluster
from octavo_operator.autoscale.metrics import parse_page
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.kinds import CONTROLLER_REVISION, DEPLOYMENT, INFERENCE_SERVICE, Kind
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store

KEY = ("team", "chat")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
CANARY = {"steps": [{"weight": 25, "pauseSeconds": 100}, {"weight": 50, "pauseSeconds": 100}]}


def manifest(image_args: list[str], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": {
            "model": {"storageUri": "hf://org/model"},
            "engine": {"extraArgs": image_args},
            "replicas": 4,
            "rollout": {"canary": CANARY},
            **spec,
        },
    }


class World:
    """The reconciler on a clock of the test."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.now = 1_800_000_000.0
        self.store = Store()
        self.cluster = SmallCluster(self.store, session)
        self.restart()

    def restart(self) -> None:
        """Another operator takes over, with nothing but what the cluster holds."""
        recorder = EventRecorder(self.cluster)
        self.reconciler = Reconciler(self.cluster, self.store, recorder, OperatorSettings(), now=lambda: self.now)

    async def look(self, seconds: float = 0.0) -> dict[str, Any]:
        """Time passes, the operator looks, the cluster follows, the operator looks again."""
        self.now += seconds
        await self.reconciler.reconcile(KEY)
        self.cluster.settle()
        await self.reconciler.reconcile(KEY)
        return self.status

    @property
    def status(self) -> dict[str, Any]:
        found = self.store.get(INFERENCE_SERVICE, *KEY)
        assert found is not None
        status: dict[str, Any] = found["status"]
        return status

    def condition(self, type_: str) -> tuple[str, str]:
        (found,) = (c for c in self.status["conditions"] if c["type"] == type_)
        return found["status"], found["reason"]

    def deployments(self) -> dict[str, tuple[int, list[str]]]:
        """Replicas and the engine's further arguments of every Deployment."""
        return {
            d["metadata"]["name"]: (
                d["spec"]["replicas"],
                [w for w in d["spec"]["template"]["spec"]["containers"][0]["command"] if w.startswith("--v")],
            )
            for d in self.store.all(DEPLOYMENT)
        }

    @property
    def weight(self) -> int | None:
        route = self.store.get(CONFIG_MAP, "team", "chat-route")
        assert route is not None
        canary = json.loads(route["data"]["route.json"]).get("canary")
        return None if canary is None else int(canary["weight"])


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        world.cluster.submit(manifest(["--v1"]))
        await world.look()
        assert world.deployments() == {"chat": (4, ["--v1"])}
        yield world


async def test_a_healthy_change_goes_through_its_steps_and_takes_over(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    status = await world.look()
    assert world.deployments() == {"chat": (3, ["--v1"]), "chat-canary": (1, ["--v2"])}
    assert world.weight == 25
    assert world.condition("Progressing") == ("True", "CanaryStep1")
    assert status["desiredReplicas"] == 4
    assert {r["weight"]: r["readyReplicas"] for r in status["revisions"]} == {75: 4, 25: 1}
    await world.look(101)
    assert world.deployments() == {"chat": (2, ["--v1"]), "chat-canary": (2, ["--v2"])}
    assert world.weight == 50
    await world.look(101)
    assert world.deployments()["chat"] == (4, ["--v2"])
    await world.look()
    assert world.deployments() == {"chat": (4, ["--v2"])}
    assert world.weight is None
    assert "canary" not in world.status
    assert world.store.all(CONTROLLER_REVISION) == []
    assert world.condition("Progressing") == ("False", "Complete")
    wanted = ["CanaryStarted", "CanaryStep", "CanaryStep", "CanaryPromoting", "CanaryPromoted"]
    assert [e for e in world.cluster.events if e.startswith("Canary")] == wanted


async def test_a_change_that_crashes_is_taken_back_and_the_former_revision_never_stopped(world: World) -> None:
    before = world.store.get(DEPLOYMENT, *KEY)
    world.cluster.broken.add("chat-canary")
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    await world.look(5)
    assert world.deployments() == {"chat": (4, ["--v1"])}
    after = world.store.get(DEPLOYMENT, *KEY)
    assert before is not None
    assert after is not None
    assert after["spec"] == before["spec"]
    assert world.status["canary"]["phase"] == "RolledBack"
    assert "boom" in world.status["canary"]["message"]
    assert world.condition("Degraded") == ("True", "CanaryRolledBack")
    assert world.condition("Ready")[0] == "True"
    assert "CanaryRolledBack" in world.cluster.events
    await world.look(10_000)
    assert world.deployments() == {"chat": (4, ["--v1"])}, "the same revision is not tried again"
    world.cluster.broken.clear()
    world.cluster.submit(manifest(["--v3"]))
    await world.look()
    assert world.deployments() == {"chat": (3, ["--v1"]), "chat-canary": (1, ["--v3"])}


def gateway_page(requests: int, errors: int) -> Any:
    labels = 'model="chat",namespace="team",track="canary"'
    text = f"octavo_gateway_track_requests_total{{{labels}}} {requests}\n"
    return parse_page(text + f"octavo_gateway_track_errors_total{{{labels}}} {errors}\n", 0.0)


async def test_failed_requests_that_the_gateways_count_take_a_change_back(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    state = world.reconciler.states[KEY]
    assert state.trial is not None
    state.meter.begin(state.trial.revision, state.trial.step)
    state.meter.add({"gateway-1": gateway_page(0, 0)}, "chat", "team")
    state.meter.add({"gateway-1": gateway_page(200, 40)}, "chat", "team")
    await world.look(5)
    assert world.deployments() == {"chat": (4, ["--v1"])}
    assert "20.0% of 200 requests failed" in world.status["canary"]["message"]


async def test_a_trial_survives_the_operator_and_writes_nothing_when_nothing_changes(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    await world.look()
    world.restart()
    writes = world.cluster.writes
    await world.look(50)
    assert world.cluster.writes == writes
    await world.look(51)
    assert world.weight == 50, "the pause began before the restart"


async def test_going_back_ends_the_trial_and_removing_the_canary_rolls_out_at_once(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    world.cluster.submit(manifest(["--v1"]))
    await world.look()
    assert world.deployments() == {"chat": (4, ["--v1"])}
    assert world.weight is None
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    assert "chat-canary" in world.deployments()
    world.cluster.submit(manifest(["--v2"], rollout={}))
    await world.look()
    assert world.deployments() == {"chat": (4, ["--v2"])}


async def test_a_second_edit_starts_over_against_the_revision_that_still_serves(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    await world.look(101)
    assert world.weight == 50
    world.cluster.submit(manifest(["--v3"]))
    await world.look()
    assert world.deployments() == {"chat": (3, ["--v1"]), "chat-canary": (1, ["--v3"])}
    assert world.weight == 25


async def test_scaling_during_a_trial_moves_both_parts(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    world.cluster.submit(manifest(["--v2"], replicas=8))
    await world.look()
    assert world.deployments() == {"chat": (6, ["--v1"]), "chat-canary": (2, ["--v2"])}
    assert world.status["desiredReplicas"] == 8


async def test_without_a_canary_in_the_spec_a_change_is_a_plain_rollout(world: World) -> None:
    world.cluster.submit(manifest(["--v2"], rollout={}))
    await world.look()
    assert world.deployments() == {"chat": (4, ["--v2"])}


async def test_a_deployment_that_was_deleted_by_hand_is_made_anew_without_a_trial(world: World) -> None:
    world.cluster.submit(manifest(["--v2"]))
    await world.look()
    await world.cluster.delete(DEPLOYMENT, "team", "chat")
    world.cluster.settle()
    await world.look()
    assert world.deployments() == {"chat": (4, ["--v2"])}
    assert "canary" not in world.status
