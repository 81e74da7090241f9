"""The adapter loop and Octavo's own engine with a real model: loaded, replaced, refused, unloaded, restarted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import pytest

from fakes.small_cluster import SmallCluster
from models.lora_adapters import write_adapter
from models.smollm2_reference import load_reference
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.controller.adapters import AdapterLoop
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.kinds import POD
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.replicas import ADDRESS_ANNOTATION
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store
from octavo_operator.plan import plan

pytestmark = pytest.mark.slow
KEY = ("team", "chat")


@pytest.fixture(scope="module")
def adapters(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters red and blue, and one whose rank is too large."""
    folder = tmp_path_factory.mktemp("adapters")
    base = load_reference(smollm2_gguf)
    for seed, (name, rank) in enumerate((("red", 8), ("blue", 8), ("large", 32))):
        write_adapter(base, folder / name, seed, target_modules=["q_proj", "v_proj"], r=rank)
    return folder


class Engine:
    """A replica of Octavo's own engine as a process."""

    def __init__(self, model: Path, root: Path) -> None:
        command = [
            sys.executable, "-m", "octavo_cli.main", "serve", str(model), "--served-model-name", "smollm2", "--port",
            "0", "--device", "cpu", "--dtype", "float32", "--max-model-len", "512", "--num-kv-blocks", "128",
            "--num-threads", "1", "--drain-propagation", "0", "--enable-lora", "--max-loras", "2",
            "--max-lora-rank", "16", "--lora-root", str(root),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        url = None
        while url is None:
            self.lines.append(self.process.stderr.readline())
            assert self.lines[-1], "".join(self.lines)
            found = re.search(r"listening on (http://\S+)", self.lines[-1])
            url = found[1] if found else None
        self.url = url
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True).start()
        deadline = time.monotonic() + 180
        while httpx2.get(f"{self.url}/health/ready").status_code != 200:
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, "".join(self.lines)

    def answer(self, model: str) -> httpx2.Response:
        body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        return httpx2.post(f"{self.url}/v1/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path, adapters: Path) -> Iterator[Engine]:
    engine = Engine(smollm2_gguf, adapters)
    yield engine
    engine.stop()


class World:
    """The loop, and one pod that is the engine of the test."""

    def __init__(self, session: aiohttp.ClientSession, root: Path) -> None:
        self.root, self.session = root, session
        self.store, self.state = Store(), ServiceState()
        self.cluster = Pods(self.store, session)
        settings = OperatorSettings()
        reconciler = Reconciler(self.cluster, self.store, EventRecorder(self.cluster), settings)
        reconciler.states[KEY] = self.state
        self.loop = AdapterLoop(self.cluster, reconciler, self.store, settings, lambda key: None)

    def run_on(self, engine: Engine) -> None:
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        labels = {"serving.octavo.dev/inferenceservice": "chat", "app.kubernetes.io/component": "engine"}
        annotations = {ADDRESS_ANNOTATION: engine.url.removeprefix("http://")}
        metadata = {"name": "chat-1", "namespace": "team", "labels": labels, "annotations": annotations}
        status = {"phase": "Running", "conditions": [{"type": "PodScheduled", "status": "True"}, ready]}
        self.store.put(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status})

    async def want(self, **folders: str) -> dict[str, tuple[str, int, str]]:
        """Ask for adapters by the names of their folders, and look once."""
        items = [{"name": name, "storageUri": f"pvc://claim/{folder}"} for name, folder in folders.items()]
        document = {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": {"model": {"storageUri": "hf://org/model", "adapters": {"items": items}}},
        }
        planned = plan(parse(InferenceService, document))
        (workload,) = planned.workloads
        moved = {name: path.replace("/mnt/models/claim", str(self.root)) for name, path in workload.adapters.items()}
        self.state.plan = replace(planned, workloads=(replace(workload, adapters=moved),))
        await self.loop.tend(KEY, self.state, self.session)
        return {view.name: (view.state.value, view.ready_replicas, view.message) for view in self.state.adapters or ()}


class Pods(SmallCluster):
    """Annotations of pods can be patched."""

    async def patch(self, kind: Any, namespace: str | None, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        pod = self.store.get(kind, namespace, name)
        assert pod is not None
        annotations = {**pod["metadata"]["annotations"], **patch["metadata"]["annotations"]}
        kept = {name: value for name, value in annotations.items() if value is not None}
        return {**pod, "metadata": {**pod["metadata"], "annotations": kept}}


@pytest.fixture
async def world(engine: Engine, adapters: Path) -> AsyncIterator[World]:
    async with aiohttp.ClientSession() as session:
        world = World(session, adapters)
        world.run_on(engine)
        yield world
        await world.want()


async def test_adapters_come_are_replaced_and_go_while_the_engine_runs(world: World, engine: Engine) -> None:
    assert await world.want(sql="red", code="blue") == {"sql": ("Loaded", 1, ""), "code": ("Loaded", 1, "")}
    red = engine.answer("sql").json()["choices"][0]["text"]
    assert engine.answer("smollm2").status_code == 200
    assert await world.want(sql="blue") == {"sql": ("Loaded", 1, "")}
    assert engine.answer("sql").json()["choices"][0]["text"] != red, "the name now means the other adapter"
    assert engine.answer("code").status_code == 404
    assert await world.want() == {}
    assert engine.answer("sql").status_code == 404


async def test_what_the_engine_refuses_is_told_in_its_words_and_the_rest_serves_on(
    world: World, engine: Engine
) -> None:
    seen = await world.want(big="large", gone="nowhere", sql="red")
    assert seen["sql"] == ("Loaded", 1, "")
    assert seen["big"][0] == seen["gone"][0] == "Failed"
    assert "rank" in seen["big"][2]
    assert "no folder under the server's adapter root" in seen["gone"][2]
    assert engine.answer("sql").status_code == 200


async def test_an_engine_that_restarted_gets_its_adapters_back(world: World, smollm2_gguf: Path) -> None:
    await world.want(sql="red")
    pod = world.store.get(POD, "team", "chat-1")
    assert pod is not None
    another = Engine(smollm2_gguf, world.root)  # the same pod, whose container began anew
    try:
        pod["metadata"]["annotations"][ADDRESS_ANNOTATION] = another.url.removeprefix("http://")
        assert await world.want(sql="red") == {"sql": ("Loaded", 1, "")}
        assert another.answer("sql").status_code == 200
    finally:
        another.stop()
