"""A fleet under load: rolled, killed, black-holed. What was accepted is answered in full."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from dataclasses import replace

from fakes.gateway_door import HELLO, Door, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import Endpoint, EndpointState, Strategy

STREAM = HELLO | {"stream": True}


async def keep_asking(door: Door, stop: asyncio.Event, answers: list[tuple[int, str]]) -> None:
    """One client that sends its next request when the last is answered."""
    while not stop.is_set():
        status, text, _ = await door.read(STREAM)
        answers.append((status, text))


async def test_rolling_every_replica_under_load_loses_no_request() -> None:
    stop = asyncio.Event()
    answers: list[tuple[int, str]] = []
    async with contextlib.AsyncExitStack() as stack:
        running: dict[str, contextlib.AsyncExitStack] = {}
        fleet: list[OpenAIReplica] = []

        async def launch(name: str) -> OpenAIReplica:
            replica = OpenAIReplica(name, tokens=5, token_delay=0.01)
            running[name] = contextlib.AsyncExitStack()
            await running[name].enter_async_context(replica.serve())
            stack.push_async_callback(running[name].aclose)
            return replica

        fleet = [await launch(f"old-{i}") for i in range(3)]
        door = await stack.enter_async_context(open_door(entry(*fleet), connect_timeout=10))
        clients = [asyncio.ensure_future(keep_asking(door, stop, answers)) for _ in range(25)]
        await until(lambda: len(answers) > 25)
        for number in range(3):
            leaving = fleet.pop(0)
            fleet.append(await launch(f"new-{number}"))
            full = entry(*fleet, leaving)
            drained = replace(full.endpoints[-1], state=EndpointState.DRAINING)
            door.serve(replace(full, endpoints=(*full.endpoints[:-1], drained)))
            await until(lambda leaving=leaving: leaving.running == 0)
            await running[leaving.name].aclose()
            door.serve(entry(*fleet))
        count = len(answers)
        await until(lambda: len(answers) > count + 25)
        stop.set()
        await asyncio.gather(*clients)

    assert {status for status, _ in answers} == {200}
    assert all(text.endswith("data: [DONE]\n\n") for _, text in answers)
    assert any('"new-2-4 "' in text for _, text in answers)


async def test_killing_a_replica_under_load_costs_only_the_streams_it_was_sending() -> None:
    stop = asyncio.Event()
    answers: list[tuple[int, str]] = []
    async with contextlib.AsyncExitStack() as stack:
        fleet = [OpenAIReplica(f"r{i}", tokens=5, token_delay=0.01, first_byte_delay=0.02) for i in range(3)]
        victim = contextlib.AsyncExitStack()
        await victim.enter_async_context(fleet[0].serve())
        for replica in fleet[1:]:
            await stack.enter_async_context(replica.serve())
        door = await stack.enter_async_context(open_door(entry(*fleet), connect_timeout=10))
        clients = [asyncio.ensure_future(keep_asking(door, stop, answers)) for _ in range(20)]
        await until(lambda: len(answers) > 40)
        busy = fleet[0].running
        await victim.aclose()
        count = len(answers)
        await until(lambda: len(answers) > count + 40)
        stop.set()
        await asyncio.gather(*clients)

    whole = [text for _, text in answers if text.endswith("data: [DONE]\n\n")]
    broken = [text for _, text in answers if not text.endswith("data: [DONE]\n\n")]
    assert {status for status, _ in answers} == {200}
    assert len(broken) <= busy + 2
    assert all('"code":"replica_failed"' in text for text in broken)
    assert len(whole) + len(broken) == len(answers)


async def test_a_black_hole_among_replicas_costs_nothing_once_discovery_drops_it() -> None:
    """It accepts connections and stays silent. Others go on being answered; those caught move on when it vanishes."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(200)
        silent = Endpoint("silent", f"http://127.0.0.1:{hole.getsockname()[1]}")
        async with OpenAIReplica("live").serve() as live:
            alone = entry(live)
            both = replace(alone, endpoints=(*alone.endpoints, silent))
            async with open_door(both) as door:
                requests = [asyncio.ensure_future(door.read(STREAM)) for _ in range(40)]
                await until(lambda: sum(r.done() for r in requests) >= 20)
                caught = [r for r in requests if not r.done()]
                door.serve(alone)
                answers = await asyncio.gather(*requests)

    assert caught
    assert {status for status, _, _ in answers} == {200}
    assert all(text.endswith("data: [DONE]\n\n") for _, text, _ in answers)


async def test_after_many_random_cancels_every_count_is_back_at_zero() -> None:
    rng = random.Random(11)
    replica = OpenAIReplica("r", tokens=4, token_delay=0.005)
    async with replica.serve(), open_door(entry(replica), access_log=False, connect_timeout=10) as door:
        for _ in range(8):
            tasks = [asyncio.ensure_future(door.read(HELLO | {"stream": rng.random() < 0.5})) for _ in range(25)]
            for task in tasks:
                await asyncio.sleep(rng.random() * 0.004)
                if rng.random() < 0.7:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: door.server.app.in_flight == 0)
        await until(lambda: replica.running == 0)
        load, signals = door.server.app.loads["r"], door.server.app.signals("m")

        assert (load.in_flight, load.pending_tokens) == (0, 0)
        assert (signals.held, signals.in_flight) == (0, 0)


async def test_a_replica_that_restarts_behind_its_address_is_believed_to_have_cached_nothing() -> None:
    page = "octavo_requests_waiting 0\noctavo_requests_running 0\noctavo_generation_tokens_total {}\n"
    question = {"model": "m", "messages": [{"role": "user", "content": "long " * 400}]}
    replica = OpenAIReplica("r", metrics=page.format(500), cached_tokens=7)
    async with replica.serve(), open_door(entry(replica, strategy=Strategy.PREFIX_AWARE)) as door:
        index, load = door.server.app.index, door.server.app.loads["r"]
        await until(lambda: load.report is not None)
        await door.read(question)
        believed = len(index)
        replica.metrics = page.format(3)
        await until(lambda: len(index) == 0)

    assert believed > 0
