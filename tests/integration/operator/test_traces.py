"""The operator's traces, as a real OTLP collector gets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web

from fakes.otlp_collector import Collector, attributes, otlp_collector
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.settings import OperatorSettings

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2.yaml"
SERVICE = yaml.safe_load(EXAMPLE.read_text())
SERVICE["metadata"] = {"name": "chat", "namespace": "team", "uid": "u", "resourceVersion": "1", "generation": 1}


async def take(request: web.Request) -> web.Response:
    body = await request.json()
    return web.json_response(body if isinstance(body, dict) and "metadata" in body else SERVICE)


@pytest.fixture
async def api() -> AsyncIterator[str]:
    """The address of an API server that takes every write."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with otlp_collector() as made:
        yield made


async def reconciled(url: str, endpoint: str) -> KubeClient:
    async with aiohttp.ClientSession() as session:
        client = KubeClient(url, session)
        room = EngineRoom(client, OperatorSettings(otlp_endpoint=endpoint, engine_image="engine:1"))
        room.store.put(INFERENCE_SERVICE, SERVICE)
        await room.reconciler.reconcile(("team", "chat"))
        return client


async def test_a_reconcile_is_a_trace_with_every_call_in_it(
    api: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    client = await reconciled(api, collector.url)
    async with asyncio.timeout(20):
        while not any(span.name == "reconcile InferenceService" for span in collector.spans):
            await asyncio.sleep(0.05)
    (whole,) = [span for span in collector.spans if span.name == "reconcile InferenceService"]
    calls = [span for span in collector.spans if span is not whole]
    about = attributes(whole)
    assert about["octavo.inference_service"] == "chat"
    assert about["octavo.writes"] == client.writes == len(calls) > 3
    assert {span.parent_span_id for span in calls} == {whole.span_id}
    assert any(span.name.endswith("/namespaces/team/deployments/chat") for span in calls)
    assert any(span.name.endswith("/inferenceservices/chat/status") for span in calls)


async def test_without_an_endpoint_nothing_is_told(api: str, collector: Collector) -> None:
    client = await reconciled(api, "")
    assert client.writes > 3
    assert collector.spans == []
