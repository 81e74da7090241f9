"""The operator's traces, as a real OTLP collector gets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.settings import OperatorSettings

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2.yaml"
SERVICE = yaml.safe_load(EXAMPLE.read_text())
SERVICE["metadata"] = {"name": "chat", "namespace": "team", "uid": "u", "resourceVersion": "1", "generation": 1}


@dataclass
class Collector:
    """An API server that takes every write, and an OTLP collector."""

    spans: list[Span] = field(default_factory=list)
    url: str = ""

    async def collect(self, request: web.Request) -> web.Response:
        told = ExportTraceServiceRequest.FromString(await request.read())
        self.spans += [span for r in told.resource_spans for scope in r.scope_spans for span in scope.spans]
        return web.Response()

    async def take(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response(body if isinstance(body, dict) and "metadata" in body else SERVICE)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    found = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", found.collect)
    app.router.add_route("*", "/{path:.*}", found.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


async def reconciled(url: str, endpoint: str) -> KubeClient:
    async with aiohttp.ClientSession() as session:
        client = KubeClient(url, session)
        room = EngineRoom(client, OperatorSettings(otlp_endpoint=endpoint, engine_image="engine:1"))
        room.store.put(INFERENCE_SERVICE, SERVICE)
        await room.reconciler.reconcile(("team", "chat"))
        return client


async def test_a_reconcile_is_a_trace_with_every_call_in_it(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    client = await reconciled(collector.url, collector.url)
    async with asyncio.timeout(20):
        while not any(span.name == "reconcile InferenceService" for span in collector.spans):
            await asyncio.sleep(0.05)
    (whole,) = [span for span in collector.spans if span.name == "reconcile InferenceService"]
    calls = [span for span in collector.spans if span is not whole]
    about = {item.key: item.value for item in whole.attributes}
    assert about["octavo.inference_service"].string_value == "chat"
    assert about["octavo.writes"].int_value == client.writes == len(calls) > 3
    assert {span.parent_span_id for span in calls} == {whole.span_id}
    assert any(span.name.endswith("/namespaces/team/deployments/chat") for span in calls)
    assert any(span.name.endswith("/inferenceservices/chat/status") for span in calls)


async def test_without_an_endpoint_nothing_is_told(collector: Collector) -> None:
    client = await reconciled(collector.url, "")
    assert client.writes > 3
    assert collector.spans == []
