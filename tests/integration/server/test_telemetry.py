"""Traces and metrics as an OpenTelemetry collector receives them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine
from fakes.running_server import running_server

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Collector:
    """An OTLP/HTTP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.raw = b""

    async def traces(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response()

    async def receive_metrics(self, request: web.Request) -> web.Response:
        for resource in ExportMetricsServiceRequest.FromString(await request.read()).resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics.update({metric.name: metric for metric in scope.metrics})
        return web.Response()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    made = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", made.traces)
    app.router.add_post("/v1/metrics", made.receive_metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


async def test_one_trace_from_the_caller_to_the_phases(collector: Collector) -> None:
    body = {"messages": [{"role": "user", "content": "secret canary"}], "temperature": 0.5, "max_tokens": 9}
    async with running_server(FakeEngine(step_s=0.005), otlp_endpoint=collector.url) as server:
        await server.post("/v1/chat/completions", body, headers={"traceparent": PARENT})

    spans = {span.name: span for span in collector.spans}
    request, chat = spans["POST /v1/chat/completions"], spans["chat fake-model"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert chat.parent_span_id == request.span_id
    assert attributes(request)["http.response.status_code"] == 200
    facts = attributes(chat)
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.request.temperature"] == 0.5
    assert facts["gen_ai.usage.output_tokens"] == 9
    assert facts["gen_ai.usage.cache_read.input_tokens"] == 16
    phases = sorted((span for span in collector.spans if span.parent_span_id == chat.span_id),
                    key=lambda span: span.start_time_unix_nano)  # fmt: skip
    assert [span.name for span in phases][-2:] == ["prefill", "decode"]
    covered = sum(span.end_time_unix_nano - span.start_time_unix_nano for span in phases)
    assert covered >= 0.99 * (chat.end_time_unix_nano - chat.start_time_unix_nano)
    assert b"canary" not in collector.raw


async def test_metrics_follow_the_semantic_conventions(collector: Collector) -> None:
    async with running_server(FakeEngine(), otlp_endpoint=collector.url) as server:
        await server.post("/v1/completions", {"prompt": "Hi"})

    assert {
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.server.request.duration",
        "gen_ai.client.token.usage",
    } <= collector.metrics.keys()
    usage = collector.metrics["gen_ai.client.token.usage"].histogram.data_points
    assert {attributes(point)["gen_ai.token.type"]: point.sum for point in usage} == {"input": 3, "output": 16}


async def test_an_aborted_sequence_is_traced_as_such(collector: Collector) -> None:
    body = {"prompt": "Hi", "stream": True, "ignore_eos": True, "max_tokens": 3_000}
    async with running_server(FakeEngine(step_s=0.005), otlp_endpoint=collector.url) as server:
        async with server.http.post(f"{server.url}/v1/completions", json=body) as response:
            await response.content.readany()
            response.close()
        await eventually(lambda: server.replica.lifecycle.num_in_flight == 0)

    (span,) = (span for span in collector.spans if span.name == "text_completion fake-model")
    assert span.status.code == 2
    assert attributes(span)["gen_ai.response.finish_reasons"].values[0].string_value == "abort"


async def test_a_collector_that_is_away_disturbs_nobody(serve: Callable[..., Any]) -> None:
    server = await serve(otlp_endpoint="http://127.0.0.1:9")

    status, _, _ = await server.post("/v1/completions", {"prompt": "Hi"})

    assert status == 200
