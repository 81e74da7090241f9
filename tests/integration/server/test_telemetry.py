"""Traces and metrics as an OpenTelemetry collector receives them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine
from fakes.otlp_collector import Collector, attributes, otlp_collector
from fakes.running_server import running_server

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with otlp_collector() as made:
        yield made


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
    assert [span.name for span in phases][-3:] == ["prefill", "decode", "detokenize"]
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
