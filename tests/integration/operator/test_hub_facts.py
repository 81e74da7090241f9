"""What a hub says of a model becomes an estimate in the status, asked once and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fakes.small_cluster import SmallCluster
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store

KEY = ("team", "chat")
COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
CONFIG = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 16384, "torch_dtype": "bfloat16",
}  # fmt: skip
FILES = [
    {"rfilename": "model-00001-of-00002.safetensors", "size": 9_000_000_000},
    {"rfilename": "model-00002-of-00002.safetensors", "size": 7_060_556_376},
    {"rfilename": "original/consolidated.00.safetensors", "size": 16_060_556_376},
    {"rfilename": "README.md", "size": 1},
]


class Hub:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 200
        self.address = ""

    async def info(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if self.status != 200:
            return web.Response(status=self.status)
        return web.json_response({"sha": COMMIT, "siblings": FILES, "padding": "x" * 300_000})

    async def config(self, request: web.Request) -> web.Response:
        assert request.match_info["commit"] == COMMIT, "sizes and shape are of one commit"
        return web.json_response(CONFIG)


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    hub = Hub()
    app = web.Application()
    app.router.add_get("/api/models/{org}/{name}/revision/{revision}", hub.info)
    app.router.add_get("/{org}/{name}/resolve/{commit}/config.json", hub.config)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield hub
    await runner.cleanup()


class World:
    """A reconciler that asks this hub."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str) -> None:
        self.now = 1_800_000_000.0
        self.store = Store()
        self.cluster = SmallCluster(self.store, session)
        settings = OperatorSettings(hub_endpoint=endpoint)
        recorder = EventRecorder(self.cluster)
        self.reconciler = Reconciler(self.cluster, self.store, recorder, settings, now=lambda: self.now)
        self.told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def submit(self, memory: str, uri: str = "hf://org/model", **model: Any) -> None:
        self.cluster.submit(
            {
                "apiVersion": "serving.octavo.dev/v1alpha1",
                "kind": "InferenceService",
                "metadata": {"name": "chat", "namespace": "team"},
                "spec": {
                    "model": {"storageUri": uri, **model},
                    "resources": {"limits": {"nvidia.com/gpu": 1}},
                    "accelerator": {"minMemory": memory},
                },
            }
        )

    async def look(self) -> tuple[str, str, str]:
        await self.reconciler.reconcile(KEY)
        (found,) = (c for c in self.status["conditions"] if c["type"] == "FitsAccelerator")
        return found["status"], found["reason"], found["message"]

    @property
    def status(self) -> dict[str, Any]:
        found = self.store.get(INFERENCE_SERVICE, *KEY)
        assert found is not None
        status: dict[str, Any] = found["status"]
        return status


@pytest.fixture
async def world(hub: Hub) -> AsyncIterator[World]:
    async with aiohttp.ClientSession() as session:
        world = World(session, hub.address)
        running = asyncio.create_task(world.reconciler.hub.run(world.told.put_nowait))
        yield world
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_a_model_is_judged_as_soon_as_the_hub_has_answered_and_asked_about_once(world: World, hub: Hub) -> None:
    world.submit("80Gi")
    assert (await world.look())[:2] == ("Unknown", "NotEstimated")
    assert await asyncio.wait_for(world.told.get(), 5) == KEY
    status, reason, message = await world.look()
    assert (status, reason) == ("True", "Estimated")
    assert "weights 15.0Gi" in message
    assert world.status["model"]["bytesTotal"] == 16_060_556_376
    assert world.status["model"]["revision"] == COMMIT
    await world.look()
    assert len(hub.asked) == 1


async def test_a_model_that_cannot_fit_is_told_before_anything_runs_and_is_not_held_back(world: World) -> None:
    world.submit("16Gi")
    await world.look()
    await asyncio.wait_for(world.told.get(), 5)
    status, reason, message = await world.look()
    assert (status, reason) == ("False", "DoesNotFit")
    assert "set spec.model.quantization.weights" in message
    assert world.status["desiredReplicas"] == 1


@pytest.mark.parametrize("status", [401, 404, 429, 500])
async def test_a_hub_that_refuses_is_asked_again_only_later(world: World, hub: Hub, status: int) -> None:
    hub.status = status
    world.submit("80Gi")
    await world.look()
    await asyncio.wait_for(world.told.get(), 5)
    assert await world.look() == ("Unknown", "NotEstimated", f"the hub answered {status} for org/model")
    await world.look()
    assert len(hub.asked) == 1
    hub.status = 200
    world.now += 601
    await world.look()
    await asyncio.wait_for(world.told.get(), 5)
    assert (await world.look())[1] == "Estimated"


async def test_what_is_not_on_the_hub_is_not_asked_about(world: World, hub: Hub) -> None:
    world.submit("80Gi", uri="s3://bucket/model")
    assert await world.look() == ("Unknown", "NotEstimated", "only models at hf://ORG/NAME are looked up")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("memory", "code", "told"), [("80Gi", 0, ""), ("16Gi", 2, "does not fit its accelerator: needs")]
)
async def test_octavo_render_asks_the_hub_when_told_to(
    hub: Hub, tmp_path: Path, memory: str, code: int, told: str
) -> None:
    manifest = tmp_path / "chat.yaml"
    manifest.write_text(
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: chat}\nspec:\n"
        f"  model: {{storageUri: hf://org/model}}\n  accelerator: {{minMemory: {memory}}}\n"
        "  resources: {limits: {nvidia.com/gpu: 1}}\n"
    )
    words = ["-m", "octavo_cli.main", "render", "-f", str(manifest), "--check-fit", "--hub-endpoint", hub.address]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == code, errors.decode()
    assert told in errors.decode()
    assert (b"kind: Deployment" in out) is (code == 0)
