"""The data path over real sockets: routing by name, streaming, headers, errors, cancellation, retries."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import openai
import pytest

from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import RetryPolicy


async def test_the_openai_client_gets_whole_and_streamed_answers() -> None:
    async with OpenAIReplica("r0").serve() as replica, open_door(entry(replica)) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "Hi"}]
        whole = await client.chat.completions.create(model="m", messages=messages)
        stream = await client.chat.completions.create(
            model="m", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        names = [model.id async for model in client.models.list()]
        await client.close()

    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == streamed.strip()
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == replica.tokens
    assert names == ["m"]


async def test_an_unknown_model_is_a_404_that_lists_the_known_ones() -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica, name="known")) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="m", messages=HELLO["messages"])
        await client.close()

    assert caught.value.code == "model_not_found"
    assert "known" in str(caught.value)
    assert replica.received == []


async def test_models_of_all_services_aliases_and_adapters_are_listed() -> None:
    async with OpenAIReplica().serve() as replica:
        entries = (entry(replica, name="a", aliases=("a-alias",), adapters=("sql",)), entry(replica, name="b"))
        async with open_door(*entries) as door:
            async with door.http.get(f"{door.url}/v1/models") as response:
                cards = {card["id"]: card for card in (await response.json())["data"]}
            async with door.http.get(f"{door.url}/v1/models/sql") as response:
                one = await response.json()
            async with door.http.get(f"{door.url}/v1/models/nope") as response:
                missing = response.status

    assert set(cards) == {"a", "a-alias", "b", "sql"}
    assert cards["sql"]["parent"] == "a"
    assert one["id"] == "sql"
    assert missing == 404


async def test_the_body_reaches_the_replica_byte_for_byte() -> None:
    body = b'{ "model": "m",\n "messages":[{"role":"user","content":"\\u00fc \xc3\xbc"}], "unknown": [1,{"a":1e5}]}'
    async with OpenAIReplica().serve() as replica, open_door(entry(replica)) as door:
        headers = {"content-type": "application/json"}
        async with door.http.post(f"{door.url}/v1/chat/completions", data=body, headers=headers) as response:
            assert response.status == 200

    assert replica.received[0].body == body


async def test_credentials_and_internal_headers_of_clients_do_not_reach_the_replica() -> None:
    spoofed = {
        "authorization": "Bearer secret",
        "cookie": "a=b",
        "x-octavo-tenant": "someone-else",
        "x-forwarded-for": "1.2.3.4",
        "connection": "keep-alive, x-secret",
        "x-secret": "1",
        "x-request-id": "my-id",
    }
    async with OpenAIReplica().serve() as replica, open_door(entry(replica)) as door:
        _, _, headers = await door.read(HELLO, headers=spoofed)

    assert headers["x-request-id"] == "my-id"
    seen = replica.received[0].headers
    assert seen["x-request-id"] == "my-id"
    assert seen["traceparent"].startswith("00-")
    assert not {"authorization", "cookie", "x-octavo-tenant", "x-forwarded-for", "x-secret"} & set(seen)


async def test_internal_and_hop_by_hop_headers_of_replicas_do_not_reach_the_client() -> None:
    extra = [(b"x-octavo-secret", b"1"), (b"keep-alive", b"timeout=5"), (b"x-fine", b"yes"), (b"set-cookie", b"a=b")]
    replica = OpenAIReplica(response_headers=extra)
    async with replica.serve(), open_door(entry(replica)) as door, door.post(HELLO) as response:
        names = {name.lower() for name in response.headers}

    assert {"x-fine", "server-timing"} <= names
    assert not {"x-octavo-secret", "keep-alive", "set-cookie"} & names


async def test_the_routing_decision_is_told_only_where_settings_allow_it() -> None:
    async with OpenAIReplica("r0").serve() as replica:
        async with open_door(entry(replica), debug_headers=True) as door, door.post(HELLO) as response:
            assert response.headers["x-octavo-replica"] == "r0"
            assert response.headers["x-octavo-route"] == "only replica available"
        async with open_door(entry(replica)) as door, door.post(HELLO) as response:
            assert "x-octavo-replica" not in response.headers


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'{"model": 7}', 400, "model"),
        (b'{"messages": []}', 400, "model"),
        (b'{"model": "m", "stream": "yes"}', 400, "stream"),
        (b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
        (b'{"model": "m", "max_tokens": 1e999}', 400, "max_tokens"),
        (b'{"model": "m", "messages": "' + b"x" * 3_000 + b'"}', 413, None),
    ],
)
async def test_a_bad_body_is_answered_by_the_gateway_itself(body: bytes, status: int, param: str | None) -> None:
    limit = 300_000 if body.count(b"[") > 10 else 2_000
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), max_body_bytes=limit) as door:
        headers = {"content-type": "application/json"}
        async with door.http.post(f"{door.url}/v1/chat/completions", data=body, headers=headers) as response:
            answer = await response.json()

    assert response.status == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param
    assert replica.received == []


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/v1/models", {}, 405),
        ("POST", "/v1/unknown", {}, 404),
        ("POST", "/v1/chat/completions", {"content-type": "text/plain"}, 415),
        ("POST", "/v1/chat/completions", {"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ("GET", "/v1/chat/../../etc/passwd", {}, 404),
    ],
)
async def test_wrong_methods_paths_and_media_types(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica)) as door,
        door.http.request(method, door.url + path, headers=headers, data=b"{}") as response,
    ):
        assert response.status == status
        assert "error" in await response.json()

    assert replica.received == []


async def test_endless_headers_are_refused() -> None:
    async with (
        open_door(entry(), max_header_bytes=2_048) as door,
        door.http.get(f"{door.url}/v1/models", headers={"x-long": "a" * 4_000}) as response,
    ):
        assert response.status == 431
        assert (await response.json())["error"]["code"] == "headers_too_large"


async def test_a_request_head_that_never_ends_costs_its_sender_the_connection() -> None:
    async with open_door(entry(), header_timeout=0.2) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
        writer.write(b"GET /health/live HTTP/1.1\r\nx-slow: ")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_events_cut_in_pieces_arrive_whole_and_in_order() -> None:
    replica = OpenAIReplica("r", tokens=20, split_events=True)
    async with replica.serve(), open_door(entry(replica)) as door:
        text = await door.events(HELLO)

    contents = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [c["choices"][0]["delta"]["content"] for c in contents[:-1]] == [f"r-{i} " for i in range(20)]
    assert text.endswith("data: [DONE]\n\n")


async def test_the_first_event_passes_before_the_last_is_made() -> None:
    replica = OpenAIReplica(tokens=1_000, token_delay=0.05)
    async with replica.serve(), open_door(entry(replica)) as door, door.post(HELLO | {"stream": True}) as response:
        first = await response.content.readuntil(b"\n\n")
        assert (first[:6], replica.running) == (b"data: ", 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_work_on_the_replica(stream: bool) -> None:
    replica = OpenAIReplica(tokens=1_000, token_delay=0.05)
    async with replica.serve(), open_door(entry(replica)) as door:
        task = asyncio.ensure_future(door.events(HELLO) if stream else door.read(HELLO))
        await until(lambda: replica.running == 1)
        task.cancel()
        await until(lambda: replica.disconnects == 1)
        await until(lambda: door.server.app.in_flight == 0)

        assert door.server.app.signals("m").in_flight == 0
        assert door.server.app.loads["replica"].in_flight == 0


async def test_a_replica_that_dies_midway_ends_the_stream_with_an_error_event() -> None:
    replica = OpenAIReplica(tokens=10, die_after=3, split_events=True)
    async with replica.serve(), open_door(entry(replica)) as door:
        text = await door.events(HELLO)
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="m", messages=HELLO["messages"], stream=True)
        with pytest.raises(openai.APIError) as caught:
            _ = [chunk async for chunk in stream]
        await client.close()

    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "replica_failed"
    assert "[DONE]" not in text
    assert "incomplete" in str(caught.value)


async def test_an_unreachable_replica_is_replaced_by_another_before_the_first_byte() -> None:
    async with OpenAIReplica("dead").serve() as dead:
        pass
    async with OpenAIReplica("live").serve() as live, open_door(entry(dead, live)) as door:
        answers = [await door.read(HELLO) for _ in range(6)]

    assert [status for status, _, _ in answers] == [200] * 6
    assert len(live.received) == 6


async def test_a_replica_that_drains_passes_its_requests_on() -> None:
    draining = OpenAIReplica("draining", refuse_with=503)
    async with draining.serve(), OpenAIReplica("live").serve() as live, open_door(entry(draining, live)) as door:
        answers = [await door.read(HELLO) for _ in range(6)]

    assert [status for status, _, _ in answers] == [200] * 6
    assert len(draining.received) <= 4  # ejected after three refusals


async def test_requests_lost_before_their_first_byte_move_to_another_replica() -> None:
    falling = OpenAIReplica("falling", drop_before_head=True)
    async with falling.serve(), OpenAIReplica("live").serve() as live, open_door(entry(falling, live)) as door:
        answers = await asyncio.gather(*(door.read(HELLO) for _ in range(8)))

    assert [status for status, _, _ in answers] == [200] * 8


async def test_one_request_is_never_tried_more_often_than_its_policy_says() -> None:
    falling = [OpenAIReplica(f"f{i}", drop_before_head=True) for i in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        for replica in falling:
            await stack.enter_async_context(replica.serve())
        door = await stack.enter_async_context(open_door(entry(*falling, retry=RetryPolicy(attempts=2))))
        status, text, _ = await door.read(HELLO)

    assert status == 502
    assert json.loads(text)["error"]["code"] == "replica_failed"
    assert sum(len(r.received) for r in falling) == 2
    assert "127.0.0.1" not in text


async def test_the_last_refusal_of_a_replica_is_passed_on_as_it_is() -> None:
    replica = OpenAIReplica(refuse_with=429, response_headers=[])
    async with replica.serve(), open_door(entry(replica)) as door:
        status, text, _ = await door.read(HELLO)

    assert status == 429
    assert json.loads(text)["error"]["code"] == "refused"
    assert len(replica.received) == 1


async def test_a_replica_that_keeps_silent_runs_into_the_first_byte_deadline() -> None:
    replica = OpenAIReplica(first_byte_delay=30)
    async with replica.serve(), open_door(entry(replica), first_byte_timeout=0.2) as door:
        status, text, _ = await door.read(HELLO)
        await until(lambda: replica.disconnects == 1)

    assert status == 504
    assert json.loads(text)["error"]["code"] == "deadline_exceeded"
    assert len(replica.received) == 1


@pytest.mark.parametrize("settings", [{"idle_timeout": 0.2}, {"request_timeout": 0.3}])
async def test_a_stream_that_stands_still_ends_with_an_error_event(settings: dict[str, float]) -> None:
    replica = OpenAIReplica(tokens=5, token_delay=30)
    async with replica.serve(), open_door(entry(replica), **settings) as door:
        text = await door.events(HELLO)
        await until(lambda: replica.disconnects == 1)

    assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


async def test_connections_to_replicas_are_reused() -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), report_interval=60) as door:
        for _ in range(5):
            await door.read(HELLO)
        assert door.server.app.pool.idle <= 2  # one for requests, one for load reports


async def test_a_replica_that_restarts_on_its_port_costs_no_request() -> None:
    """The pooled connection is dead when it is used next: nothing was answered on it, so a fresh one is opened."""
    replica = OpenAIReplica("r")
    async with contextlib.AsyncExitStack() as stack:
        async with replica.serve():
            door = await stack.enter_async_context(open_door(entry(replica), report_interval=60))
            assert (await door.read(HELLO))[0] == 200
        async with replica.serve(replica.port):
            assert (await door.read(HELLO))[0] == 200


async def test_open_inference_requests_go_by_the_model_in_their_path() -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica)) as door:
        binary = {"content-type": "application/octet-stream", "inference-header-content-length": "2"}
        async with door.http.post(f"{door.url}/v2/models/m/infer", data=b"{}\0\1", headers=binary) as response:
            assert await response.json() == {"echo": 4}
        async with door.http.get(f"{door.url}/v2/models/none/ready") as response:
            assert response.status == 404

    assert replica.received[0].path == "/v2/models/m/infer"
    assert replica.received[0].headers["inference-header-content-length"] == "2"


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/m/..%2f..%2f..%2fpause",
        "/v2/models/m/%2e%2e/%2e%2e/pause",
        "/v2/models/m/unload",
        "/v2/models/m/infer/more",
        "/v2/repository/models/m/unload",
        "/v1/chat/completions/../../../pause",
    ],
)
async def test_nothing_but_the_known_paths_of_a_replica_can_be_reached(path: str) -> None:
    async with OpenAIReplica().serve() as replica, open_door(entry(replica)) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}".encode())
        answer = await reader.read()
        writer.close()

    assert answer.split()[1] == b"404"
    assert replica.received == []
