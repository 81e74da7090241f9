"""The scaling loop against real HTTP: replicas and gateways that answer, are slow, or lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.autoscale.metrics import parse_page
from octavo_operator.canary import Phase, Trial
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.kinds import DEPLOYMENT, INFERENCE_SERVICE, POD
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.replicas import ADDRESS_ANNOTATION
from octavo_operator.controller.scaling import ScalingLoop, gateway_signals
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store
from octavo_operator.plan import plan
from octavo_operator.render import render_plan
from octavo_operator.routes import RouteView

KEY = ("team", "chat")
SERVICE: dict[str, Any] = {
    "apiVersion": "serving.octavo.dev/v1alpha1",
    "kind": "InferenceService",
    "metadata": {"name": "chat", "namespace": "team", "uid": "u"},
    "spec": {
        "model": {"storageUri": "hf://org/model"},
        "autoscaling": {"minReplicas": 0, "maxReplicas": 4, "scaleToZero": {"idleSeconds": 60}},
    },
}


class PatchRecorder(KubeClient):
    """A client that only notes the patches it is asked for."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self.patches: list[tuple[str, Any]] = []

    async def patch(self, kind: Kind, namespace: str | None, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        self.patches.append((name, patch["metadata"]["annotations"]))
        return patch


class World:
    """A service with replicas and a gateway whose pages the test writes, and a clock."""

    def __init__(self, address: str, client: PatchRecorder) -> None:
        self.client = client
        self.now = 1_000.0
        self.pages: dict[str, str] = {}
        self.slow: set[str] = set()
        self.address = address
        self.store = Store()
        self.heard: list[tuple[str, str]] = []
        settings = OperatorSettings(own_namespace="octavo-system", scrape_timeout_s=0.2, scrape_concurrency=4)
        reconciler = Reconciler(client, self.store, EventRecorder(client), settings, now=lambda: self.now)
        self.loop = ScalingLoop(client, reconciler, self.store, settings, self.heard.append, now=lambda: self.now)
        self.state = ServiceState(plan=plan(parse(InferenceService, SERVICE)))
        reconciler.states[KEY] = self.state
        self.store.put(INFERENCE_SERVICE, SERVICE)
        self.set_replicas(1)

    def set_replicas(self, wanted: int) -> None:
        assert self.state.plan is not None
        deployment = next(o for o in render_plan(self.state.plan) if o["kind"] == "Deployment")
        deployment["spec"]["replicas"] = wanted
        deployment["metadata"]["generation"] = 1
        deployment["status"] = {"observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted}
        self.store.put(DEPLOYMENT, deployment)

    def add_pod(self, name: str, namespace: str = "team", labels: dict[str, str] | None = None) -> None:
        self.store.put(
            POD,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "labels": labels or {"serving.octavo.dev/inferenceservice": "chat"},
                    "annotations": {ADDRESS_ANNOTATION: f"{self.address}/{name}"},
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                },
                "status": {
                    "phase": "Running",
                    "podIP": "198.51.100.1",
                    "conditions": [
                        {"type": "PodScheduled", "status": "True"},
                        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:30Z"},
                    ],
                },
            },
        )

    async def decide(self) -> Any:
        async with aiohttp.ClientSession() as http:
            await self.loop.round(http)
        return self.state.decision


@pytest.fixture
async def world() -> AsyncIterator[World]:
    pages: dict[str, Any] = {}

    async def page(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        subject: World = pages["world"]
        if name in subject.slow:
            await asyncio.sleep(5)
        if name not in subject.pages:
            raise web.HTTPServiceUnavailable
        return web.Response(text=subject.pages[name])

    app = web.Application()
    app.router.add_get("/{name}/metrics", page)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    session = aiohttp.ClientSession()
    client = PatchRecorder(session)
    port = runner.addresses[0][1]
    pages["world"] = World(f"127.0.0.1:{port}", client)
    yield pages["world"]
    await session.close()
    await runner.cleanup()


def load(waiting: int = 0, running: int = 0, kv: float = 0.0) -> str:
    return f"octavo_requests_waiting {waiting}\noctavo_requests_running {running}\noctavo_kv_cache_utilization {kv}\n"


async def test_replicas_are_scraped_and_the_service_is_scaled(world: World) -> None:
    world.add_pod("chat-1")
    world.pages["chat-1"] = load(waiting=20, running=30, kv=0.95)
    decision = await world.decide()
    assert (decision.replicas, decision.waiting, decision.kv_utilization) == (2, 20, 0.95)
    assert world.state.replicas == 2
    assert world.heard == [KEY]
    assert [s.after for s in world.state.scalings] == [2]


@pytest.mark.parametrize("fault", ["slow", "broken"])
async def test_a_replica_that_does_not_answer_in_time_is_stale_and_nothing_is_lost(world: World, fault: str) -> None:
    world.add_pod("chat-1")
    if fault == "slow":
        world.pages["chat-1"] = load()
        world.slow.add("chat-1")
    decision = await world.decide()
    assert (decision.replicas, decision.frozen, decision.stale) == (1, True, 1)


async def test_requests_held_in_gateways_wake_a_sleeping_service(world: World) -> None:
    world.set_replicas(0)
    labels = {"app.kubernetes.io/component": "gateway"}
    for name, held in (("gateway-1", 2), ("gateway-2", 1)):
        world.add_pod(name, "octavo-system", labels)
        world.pages[name] = (
            f'octavo_gateway_requests_held{{model="chat",namespace="team"}} {held}\n'
            f'octavo_gateway_arrivals_total{{model="chat",namespace="team"}} {held}\n'
            'octavo_gateway_requests_held{model="other",namespace="team"} 99\n'
        )
    decision = await world.decide()
    assert (decision.replicas, decision.held, decision.reason) == (1, 3, "HeldRequests")


async def test_a_service_without_requests_is_given_back_after_its_idle_time(world: World) -> None:
    world.add_pod("chat-1")
    world.pages["chat-1"] = load()
    for _ in range(80):
        decision = await world.decide()
        world.now += 5
    assert (decision.replicas, decision.reason) == (0, "Idle")


async def test_before_scaling_down_the_busier_replicas_are_made_dearer(world: World) -> None:
    world.set_replicas(2)
    for name, running in (("chat-1", 1), ("chat-2", 0)):
        world.add_pod(name)
        world.pages[name] = load(running=running, kv=0.01)
    for _ in range(70):
        decision = await world.decide()
        if decision.replicas < 2:
            break
        world.now += 5
    assert decision.replicas == 1
    cost = "controller.kubernetes.io/pod-deletion-cost"
    assert world.client.patches == [("chat-1", {cost: "1"}), ("chat-2", {cost: "0"})]


def test_gateways_that_do_not_know_a_model_tell_nothing_of_its_arrivals() -> None:
    planned = plan(parse(InferenceService, SERVICE))
    assert gateway_signals([parse_page("other 1\n", 0.0)], planned.workloads[0]) == (0, None)


async def test_gateways_tell_whether_the_route_is_published(world: World) -> None:
    labels = {"app.kubernetes.io/component": "gateway"}
    world.add_pod("gateway-1", "octavo-system", labels)
    world.add_pod("gateway-2", "octavo-system", labels)
    await world.decide()
    assert world.state.route == RouteView(gateways=2)
    known = 'octavo_gateway_endpoints{{model="chat",namespace="{}",state="ready"}} 0\n'
    world.pages = {"gateway-1": known.format("team"), "gateway-2": "other 1\n"}
    await world.decide()
    assert world.state.route == RouteView(gateways=2, answering=2, serving=1)
    world.pages = {"gateway-1": known.format("elsewhere"), "gateway-2": known.format("elsewhere")}
    await world.decide()
    assert world.state.route == RouteView(gateways=2, answering=2, taken_by="elsewhere")


async def test_a_service_of_fixed_size_is_measured_but_never_scaled(world: World) -> None:
    fixed = {**SERVICE, "spec": {"model": SERVICE["spec"]["model"], "replicas": 1}}
    world.state.plan = plan(parse(InferenceService, fixed))
    world.add_pod("chat-1")
    world.pages["chat-1"] = load(waiting=20, running=30, kv=0.95) + "octavo_kv_cache_capacity_tokens 4096\n"
    assert await world.decide() is None
    assert world.state.capacity.kv_tokens == 4_096
    assert world.state.replicas is None


async def test_while_a_revision_is_on_trial_the_whole_service_is_scaled_not_its_part(world: World) -> None:
    world.set_replicas(3)  # and one of the canary
    world.state.trial, world.state.wanted = Trial("new", Phase.RUNNING, 0, 0.0), 4
    for name in ("chat-1", "chat-2", "chat-3", "chat-4"):
        world.add_pod(name)
        world.pages[name] = load(running=20, kv=0.7)
    decision = await world.decide()
    assert (decision.replicas, decision.ready) == (4, 4)
    assert world.state.scalings == (), "four are wanted and four serve"


async def test_what_gateways_count_of_a_trial_reaches_its_meter(world: World) -> None:
    world.add_pod("gateway-1", "octavo-system", {"app.kubernetes.io/component": "gateway"})
    world.state.trial = Trial("new", Phase.RUNNING, 0, 0.0)
    labels = 'model="chat",namespace="team",track="canary"'
    for requests, errors in ((10, 1), (60, 21)):
        world.pages["gateway-1"] = (
            f"octavo_gateway_track_requests_total{{{labels}}} {requests}\n"
            f"octavo_gateway_track_errors_total{{{labels}}} {errors}\n"
        )
        await world.decide()
    assert (world.state.meter.canary.requests, world.state.meter.canary.errors) == (50, 20)
