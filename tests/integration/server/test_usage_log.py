"""What a request consumed is known however it ended, and adds up."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ENDLESS = CHAT | {"ignore_eos": True, "max_tokens": 4_000}


def usage_id(number: int) -> str:
    return f"{number:032x}"


async def report(server: Any, *ids: str) -> dict[str, Any]:
    async with server.http.get(f"{server.url}/usage", params={"ids": ",".join(ids)}) as response:
        found: dict[str, Any] = await response.json()
        return found


async def totals(server: Any) -> dict[str, int]:
    async with server.http.get(f"{server.url}/metrics") as response:
        page = await response.text()
    found = re.findall(r'octavo_usage_tokens_total\{kind="(\w+)"\} (\S+)', page)
    return {kind: int(float(value)) for kind, value in found}


@pytest.mark.parametrize(("n", "stream"), [(1, False), (3, False), (2, True)])
async def test_an_answered_request_has_the_counts_of_its_usage(serve: Serve, n: int, stream: bool) -> None:
    server = await serve()
    headers = {"x-octavo-usage-id": usage_id(1)}
    body = CHAT | {"n": n, "stream": stream}
    async with server.http.post(f"{server.url}/v1/chat/completions", json=body, headers=headers) as response:
        await response.read()
    _, answer, _ = await server.post("/v1/chat/completions", CHAT | {"n": n})
    found = await report(server, usage_id(1), usage_id(2))

    usage = answer["usage"]
    assert found["ended"] == {
        usage_id(1): {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "output_tokens": usage["completion_tokens"],
        }
    }
    assert found["running"] == []
    assert found["uptime_s"] > 0


async def test_a_request_that_was_left_has_what_was_generated(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=0.02))
    body = ENDLESS | {"stream": True}
    async with server.http.post(
        f"{server.url}/v1/chat/completions", json=body, headers={"x-octavo-usage-id": usage_id(5)}
    ) as response:
        for _ in range(4):
            await response.content.readuntil(b"\n\n")
        running = await report(server, usage_id(5))
        response.close()
    await eventually(lambda: server.replica.lifecycle.num_in_flight == 0)
    found = (await report(server, usage_id(5)))["ended"][usage_id(5)]

    assert running["running"] == [usage_id(5)]
    assert found["output_tokens"] == server.engine.generated >= 3
    (received,) = server.engine.received.values()
    assert found["prompt_tokens"] == len(received.prompt_token_ids)


async def test_a_request_left_before_its_first_token_costs_nothing(serve: Serve) -> None:
    server = await serve(FakeEngine(step_s=30))
    asking = asyncio.create_task(
        server.post("/v1/chat/completions", ENDLESS, headers={"x-octavo-usage-id": usage_id(6)})
    )
    await eventually(lambda: server.engine.running)
    asking.cancel()
    await eventually(lambda: server.replica.lifecycle.num_in_flight == 0)

    assert (await report(server, usage_id(6)))["ended"][usage_id(6)]["prompt_tokens"] == 0


async def test_every_face_counts_and_the_totals_add_up(serve: Serve) -> None:
    """Chat, completions, responses and the v2 protocol; half of the clients leave somewhere."""
    server = await serve(FakeEngine(step_s=0.001))
    rng = random.Random(4)
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", CHAT | {"max_tokens": 40, "ignore_eos": True}),
        ("/v1/completions", {"prompt": ["a", "bc"], "max_tokens": 20, "n": 2}),
        ("/v1/responses", {"model": "fake-model", "input": "Hi"}),
        ("/v2/models/fake-model/generate", {"text_input": "Hi", "max_tokens": 30, "ignore_eos": True}),
    ]

    async def one(number: int) -> None:
        path, body = bodies[number % len(bodies)]
        asking = asyncio.create_task(server.post(path, body, headers={"x-octavo-usage-id": usage_id(number)}))
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.05)
            asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    await asyncio.gather(*(one(number) for number in range(100)))
    await eventually(lambda: server.replica.lifecycle.num_in_flight == 0)
    found = (await report(server, *(usage_id(number) for number in range(100))))["ended"]
    sums = await totals(server)

    for kind in ("prompt", "cached", "output"):
        assert sum(row[f"{kind}_tokens"] for row in found.values()) == sums[kind]
    assert sums["output"] <= server.engine.generated
    assert all(found[usage_id(3 + 4 * i)]["output_tokens"] <= 30 for i in range(25) if usage_id(3 + 4 * i) in found)


async def test_embeddings_count_their_texts(serve: Serve) -> None:
    server = await serve(FakeEngine(task="embed"))
    headers = {"x-octavo-usage-id": usage_id(9)}
    _, answer, _ = await server.post("/v1/embeddings", {"input": ["one", "two words"]}, headers=headers)

    found = (await report(server, usage_id(9)))["ended"][usage_id(9)]
    assert found == {"prompt_tokens": answer["usage"]["prompt_tokens"], "cached_tokens": 0, "output_tokens": 0}


async def test_an_id_of_another_shape_is_ignored_and_a_long_list_refused(serve: Serve) -> None:
    server = await serve()
    await server.post("/v1/chat/completions", CHAT, headers={"x-octavo-usage-id": "DROP TABLE"})

    assert (await report(server, "DROP TABLE", ""))["ended"] == {}
    async with server.http.get(f"{server.url}/usage", params={"ids": "a" * 9_000}) as response:
        assert response.status in (400, 422)
