"""The adapter loop against engines over HTTP that load, refuse, forget and die."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from octavo_operator.adapters import AdapterState
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.controller.adapters import AdapterLoop
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.kinds import POD
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.replicas import ADDRESS_ANNOTATION
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store
from octavo_operator.desired import plan_service
from octavo_operator.plan import Facts
from octavo_operator.render.labels import ADAPTERS_ANNOTATION

KEY = ("team", "chat")


class Pods(KubeClient):
    """A client whose pods live in the store."""

    def __init__(self, store: Store, session: aiohttp.ClientSession) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self._store = store

    async def patch(self, kind: Kind, namespace: str | None, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        pod = self._store.get(kind, namespace, name)
        assert pod is not None
        annotations = {**pod["metadata"]["annotations"], **patch["metadata"]["annotations"]}
        kept = {k: v for k, v in annotations.items() if v is not None}
        return {**pod, "metadata": {**pod["metadata"], "annotations": kept}}


class Fleet:
    """A service with replicas that are engines of this test."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.now = 1_000.0
        self.engines: dict[str, set[str]] = {}
        self.refusals: dict[str, str] = {}  # by adapter name
        self.down: set[str] = set()
        self.calls: list[tuple[str, str, str]] = []
        self.heard: list[tuple[str, str]] = []
        self.store = Store()
        self.session = session
        self.address = ""
        settings = OperatorSettings(own_namespace="octavo-system")
        client = Pods(self.store, session)
        reconciler = Reconciler(client, self.store, EventRecorder(client), settings, now=lambda: self.now)
        self.loop = AdapterLoop(client, reconciler, self.store, settings, self.heard.append, now=lambda: self.now)
        self.state = ServiceState()
        reconciler.states[KEY] = self.state

    def want(self, **adapters: str) -> None:
        items = [{"name": name, "storageUri": uri} for name, uri in adapters.items()]
        model = {"storageUri": "hf://org/model", "adapters": {"items": items}}
        spec = {"runtime": {"name": "vllm"}, "model": model, "resources": {"limits": {"nvidia.com/gpu": 1}}}
        document = {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": spec,
        }
        self.state.plan = plan_service(parse(InferenceService, document), [], Facts())

    def start(self, name: str) -> None:
        self.engines[name] = set()
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:30Z"}
        labels = {"serving.octavo.dev/inferenceservice": "chat", "app.kubernetes.io/component": "engine"}
        annotations = {ADDRESS_ANNOTATION: f"{self.address}/{name}"}
        metadata = {"name": name, "namespace": "team", "labels": labels, "annotations": annotations}
        status = {"phase": "Running", "conditions": [{"type": "PodScheduled", "status": "True"}, ready]}
        self.store.put(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status})

    def noted(self, name: str) -> dict[str, str]:
        pod = self.store.get(POD, "team", name)
        assert pod is not None
        found: dict[str, str] = json.loads(pod["metadata"]["annotations"].get(ADAPTERS_ANNOTATION, "{}"))
        return found

    async def tend(self) -> dict[str, tuple[str, int]]:
        await self.loop.tend(KEY, self.state, self.session)
        return {view.name: (view.state.value, view.ready_replicas) for view in self.state.adapters}

    async def serve(self, request: web.Request) -> web.Response:
        name, call = request.match_info["name"], request.match_info["call"]
        if name in self.down:
            raise web.HTTPServiceUnavailable
        loaded = self.engines[name]
        if call == "models":
            return web.json_response({"data": [{"id": model} for model in ("chat", *sorted(loaded))]})
        body = await request.json()
        adapter = body["lora_name"]
        self.calls.append((name, call, adapter))
        if call == "unload_lora_adapter":
            loaded.discard(adapter)
        elif adapter in self.refusals:
            return web.json_response({"error": {"message": self.refusals[adapter]}}, status=400)
        else:
            assert body["lora_path"].startswith("org/"), "vLLM is told the repository, not the address"
            loaded.add(adapter)
        return web.Response(text="Success")


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(session)
        app = web.Application()
        app.router.add_route("*", "/{name}/v1/{call}", fleet.serve)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fleet.address = f"127.0.0.1:{runner.addresses[0][1]}"
        yield fleet
        await runner.cleanup()


async def test_adapters_are_loaded_on_every_replica_once_and_noted_for_the_gateways(fleet: Fleet) -> None:
    fleet.want(sql="hf://org/sql", code="hf://org/code")
    fleet.start("chat-1")
    fleet.start("chat-2")
    assert await fleet.tend() == {"sql": ("Loaded", 2), "code": ("Loaded", 2)}
    assert fleet.engines == {"chat-1": {"sql", "code"}, "chat-2": {"sql", "code"}}
    assert fleet.noted("chat-2") == {"sql": "org/sql", "code": "org/code"}
    assert fleet.heard == [KEY]
    calls = len(fleet.calls)
    await fleet.tend()
    assert len(fleet.calls) == calls, "what is loaded is not loaded again"


async def test_a_new_replica_and_a_restarted_engine_get_what_is_wanted(fleet: Fleet) -> None:
    fleet.want(sql="hf://org/sql")
    fleet.start("chat-1")
    await fleet.tend()
    fleet.engines["chat-1"].clear()  # the engine crashed; its pod still carries the note
    fleet.start("chat-2")
    assert await fleet.tend() == {"sql": ("Loaded", 2)}
    assert fleet.engines == {"chat-1": {"sql"}, "chat-2": {"sql"}}


async def test_a_refused_adapter_is_named_while_others_load_and_it_is_tried_again_later(fleet: Fleet) -> None:
    fleet.want(bad="hf://org/bad", sql="hf://org/sql")
    fleet.refusals["bad"] = "rank 128 is above --max-lora-rank 64"
    fleet.start("chat-1")
    assert await fleet.tend() == {"bad": ("Failed", 0), "sql": ("Loaded", 1)}
    assert fleet.state.adapters[0].message == "chat-1: 400 rank 128 is above --max-lora-rank 64"
    await fleet.tend()
    assert fleet.calls.count(("chat-1", "load_lora_adapter", "bad")) == 1, "not again before its time"
    assert not fleet.state.adapters_loading, "a failing adapter does not hold up scaling"
    fleet.refusals.clear()
    fleet.now += 10
    assert await fleet.tend() == {"bad": ("Loaded", 1), "sql": ("Loaded", 1)}


async def test_an_adapter_that_is_no_longer_wanted_is_unloaded_and_a_foreign_one_stays(fleet: Fleet) -> None:
    fleet.want(sql="hf://org/sql")
    fleet.start("chat-1")
    fleet.engines["chat-1"].add("of-the-command-line")
    await fleet.tend()
    fleet.want()
    assert await fleet.tend() == {}
    assert fleet.engines["chat-1"] == {"of-the-command-line"}
    assert fleet.noted("chat-1") == {}


async def test_a_silent_replica_does_not_hold_up_the_others(fleet: Fleet) -> None:
    fleet.want(sql="hf://org/sql")
    fleet.start("chat-1")
    fleet.start("chat-2")
    fleet.down.add("chat-1")
    assert await fleet.tend() == {"sql": ("Pending", 1)}
    fleet.down.clear()
    assert await fleet.tend() == {"sql": (AdapterState.LOADED.value, 2)}
