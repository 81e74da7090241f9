"""One trace from the caller through the gateway to the replica, sent to a real OTLP endpoint."""

from __future__ import annotations

from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from fakes.otlp_collector import attributes, otlp_collector

CALLER = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


async def test_a_request_is_one_span_with_phases_between_caller_and_replica() -> None:
    async with otlp_collector() as collector:
        replica = OpenAIReplica("r", tokens=3, token_delay=0.02, first_byte_delay=0.05)
        async with replica.serve(), open_door(entry(replica), otlp_endpoint=collector.url) as door:
            await door.read(HELLO | {"stream": True}, headers={"traceparent": CALLER})
            await door.read(HELLO | {"model": "nope"})
        await until(lambda: collector.spans)

    spans = collector.spans
    by_name = {span.name: span for span in spans}
    request = by_name["POST /v1/chat/completions"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == ("a" * 32, "b" * 16)
    assert replica.received[0].headers["traceparent"] == f"00-{'a' * 32}-{request.span_id.hex()}-01"
    phases = [span for span in spans if span.parent_span_id == request.span_id]
    assert {span.name for span in phases} >= {"wait for replica", "stream"}
    covered = sum(span.end_time_unix_nano - span.start_time_unix_nano for span in phases)
    assert covered >= 0.95 * (request.end_time_unix_nano - request.start_time_unix_nano)
    assert attributes(request)["gen_ai.request.model"] == "m"
    assert attributes(request)["gen_ai.operation.name"] == "chat"
    assert attributes(request)["octavo.outcome"] == "ok"
    assert b"Hello" not in collector.raw


async def test_an_absent_collector_costs_no_request() -> None:
    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica), otlp_endpoint="http://127.0.0.1:9") as door,
    ):
        status, _, _ = await door.read(HELLO)

    assert status == 200


async def test_a_trace_that_the_caller_does_not_sample_is_passed_on_and_not_recorded() -> None:
    unsampled = CALLER[:-2] + "00"
    async with otlp_collector() as collector, OpenAIReplica("r").serve() as replica:
        async with open_door(entry(replica), otlp_endpoint=collector.url) as door:
            await door.read(HELLO, headers={"traceparent": unsampled})
            await door.read(HELLO, headers={"traceparent": CALLER.replace("a" * 32, "c" * 32)})
        await until(lambda: collector.spans)

    assert {span.trace_id.hex() for span in collector.spans} == {"c" * 32}
    assert replica.received[0].headers["traceparent"].endswith("-00")
