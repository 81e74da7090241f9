"""Requests for cold and busy models: held, kept alive, bounded, served when a replica comes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import openai

from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import EndpointState, HoldPolicy, ModelEntry, Saturation

COLD = ModelEntry(name="m", scale_to_zero=True, desired_replicas=0, hold=HoldPolicy(30, hold_timeout_s=20))


async def test_requests_to_a_cold_model_ask_for_activation_and_are_answered_when_it_wakes() -> None:
    replica = OpenAIReplica("woken")
    async with open_door(COLD) as door:
        requests = [asyncio.ensure_future(door.read(HELLO)) for _ in range(20)]
        await until(lambda: door.server.app.signals("m").held == 20)
        signals = door.server.app.signals("m")
        async with door.http.get(f"{door.url}/metrics") as response:
            page = await response.text()
        async with replica.serve():
            door.serve(replace(entry(replica), hold=COLD.hold))
            answers = await asyncio.gather(*requests)

    assert signals.activation
    assert signals.arrivals_total == 20
    assert 'octavo_gateway_requests_held{model="m",namespace=""} 20.0' in page
    assert 'octavo_gateway_activation{model="m",namespace=""} 1.0' in page
    assert 'octavo_gateway_arrivals_total{model="m",namespace=""} 20.0' in page
    assert [status for status, _, _ in answers] == [200] * 20
    assert replica.finished == 20


async def test_a_held_stream_hears_heartbeats_then_its_answer() -> None:
    replica = OpenAIReplica("woken")
    async with open_door(COLD) as door, door.post(HELLO | {"stream": True}) as response:
        first = [await response.content.readuntil(b"\n\n") for _ in range(3)]
        async with replica.serve():
            door.serve(entry(replica))
            rest = await response.text()

    assert response.status == 200
    assert all(line.startswith(b": waiting for a replica to start, 1 in line") for line in first)
    assert '"content": "woken-0 "' in rest
    assert rest.endswith("data: [DONE]\n\n")


async def test_the_openai_client_does_not_notice_that_its_stream_was_held() -> None:
    replica = OpenAIReplica("woken")
    async with open_door(COLD) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)

        async def ask() -> str:
            stream = await client.chat.completions.create(model="m", messages=HELLO["messages"], stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answer = asyncio.ensure_future(ask())
        await until(lambda: door.server.app.signals("m").oldest_held_s > 0.25)  # heartbeats have begun
        async with replica.serve():
            door.serve(entry(replica))
            text = await answer
        await client.close()

    assert text == "woken-0 woken-1 woken-2 woken-3 woken-4 "


async def test_a_replicas_refusal_after_heartbeats_becomes_an_error_event() -> None:
    async with open_door(COLD) as door, door.post(HELLO | {"stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        async with OpenAIReplica("woken", refuse_with=400).serve() as replica:
            door.serve(entry(replica))
            rest = await response.text()

    assert json.loads(rest.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "refused"


async def test_beyond_the_bound_requests_are_turned_away_at_once() -> None:
    async with open_door(replace(COLD, hold=HoldPolicy(5, hold_timeout_s=20))) as door:
        held = [asyncio.ensure_future(door.read(HELLO)) for _ in range(5)]
        await until(lambda: door.server.app.signals("m").held == 5)
        status, text, headers = await door.read(HELLO)
        for task in held:
            task.cancel()
        await until(lambda: door.server.app.signals("m").held == 0)

    assert status == 429
    assert json.loads(text)["error"]["code"] == "queue_full"
    assert headers["retry-after"] == "30"


async def test_a_hold_that_lasts_too_long_ends_with_503_and_with_an_event_in_streams() -> None:
    async with open_door(replace(COLD, hold=HoldPolicy(5, hold_timeout_s=0.3))) as door:
        status, text, headers = await door.read(HELLO)
        stream = await door.events(HELLO)

    assert (status, headers["retry-after"]) == (503, "30")
    assert json.loads(text)["error"]["code"] == "no_replica_available"
    assert json.loads(stream.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "no_replica_available"


async def test_a_suspended_model_refuses_at_once() -> None:
    async with open_door(ModelEntry(name="m", desired_replicas=0)) as door:
        status, text, _ = await door.read(HELLO)

    assert status == 503
    assert "suspended" in text


async def test_a_woken_replica_is_not_flooded_beyond_its_saturation_line() -> None:
    """500 arrive during the start; the first replica reports a capacity of 8 and is kept at that, not above."""
    replica = OpenAIReplica("small", token_delay=0.01, tokens=2)
    replica.metrics = "octavo_requests_waiting 0\noctavo_requests_running 8\noctavo_max_num_seqs 8\n"
    async with open_door(replace(COLD, hold=HoldPolicy(300, hold_timeout_s=30))) as door:
        requests = [asyncio.ensure_future(door.read(HELLO)) for _ in range(200)]
        await until(lambda: door.server.app.signals("m").held == 200)
        async with replica.serve():
            door.serve(entry(replica, saturation=Saturation(queue_depth=2)))
            answers = await asyncio.gather(*requests)

    assert [status for status, _, _ in answers] == [200] * 200
    assert replica.peak_running <= 8 + 2


async def test_a_draining_replica_gets_no_new_request_but_finishes_its_own() -> None:
    old, new = OpenAIReplica("old", tokens=10, token_delay=0.05), OpenAIReplica("new")
    async with old.serve(), new.serve(), open_door(entry(old)) as door:
        running = asyncio.ensure_future(door.events(HELLO))
        await until(lambda: old.running == 1)
        both = entry(old, new)
        leaving = replace(both.endpoints[0], state=EndpointState.DRAINING)
        door.serve(replace(both, endpoints=(leaving, both.endpoints[1])))
        answers = [await door.read(HELLO) for _ in range(5)]
        text = await running

    assert all('"new-0' in answer for _, answer, _ in answers)
    assert text.endswith("data: [DONE]\n\n")


async def test_a_new_replica_helps_those_who_already_wait() -> None:
    busy = OpenAIReplica("busy", tokens=100, token_delay=0.05)
    busy.metrics = "octavo_requests_waiting 9\noctavo_requests_running 8\n"
    fresh = OpenAIReplica("fresh")
    async with busy.serve(), fresh.serve(), open_door(entry(busy)) as door:
        await until(lambda: door.server.app.loads["busy"].waiting >= 4)
        waiting = [asyncio.ensure_future(door.read(HELLO)) for _ in range(3)]
        await until(lambda: door.server.app.signals("m").held == 3)
        door.serve(entry(busy, fresh))
        answers = await asyncio.gather(*waiting)

    assert all('"fresh-0' in answer for _, answer, _ in answers)
    assert busy.received == []
