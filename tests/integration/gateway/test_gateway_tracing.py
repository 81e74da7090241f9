"""One trace from the caller through the gateway to the replica, sent to a real OTLP endpoint."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica

CALLER = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, list[Span]]]:
    """An OTLP/HTTP collector that keeps what it gets."""
    spans: list[Span] = []

    async def take(request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans)
        return web.Response(body=b"", content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", spans
    finally:
        await runner.cleanup()


async def test_a_request_is_one_span_with_phases_between_caller_and_replica() -> None:
    async with collector() as (endpoint, spans):
        replica = OpenAIReplica("r", tokens=3, token_delay=0.02, first_byte_delay=0.05)
        async with replica.serve(), open_door(entry(replica), otlp_endpoint=endpoint) as door:
            await door.read(HELLO | {"stream": True}, headers={"traceparent": CALLER})
            await door.read(HELLO | {"model": "nope"})
        await until(lambda: spans)

    by_name = {span.name: span for span in spans}
    request = by_name["POST /v1/chat/completions"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == ("a" * 32, "b" * 16)
    assert replica.received[0].headers["traceparent"] == f"00-{'a' * 32}-{request.span_id.hex()}-01"
    phases = [span for span in spans if span.parent_span_id == request.span_id]
    assert {span.name for span in phases} >= {"wait for replica", "stream"}
    covered = sum(span.end_time_unix_nano - span.start_time_unix_nano for span in phases)
    assert covered >= 0.95 * (request.end_time_unix_nano - request.start_time_unix_nano)
    attributes = {a.key: a.value.string_value for a in request.attributes}
    assert attributes["gen_ai.request.model"] == "m"
    assert attributes["octavo.outcome"] == "ok"
    assert "Hello" not in str(spans)


async def test_an_absent_collector_costs_no_request() -> None:
    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica), otlp_endpoint="http://127.0.0.1:9") as door,
    ):
        status, _, _ = await door.read(HELLO)

    assert status == 200
