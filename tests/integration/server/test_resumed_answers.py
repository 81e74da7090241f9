"""A stream taken up by another replica goes on at the very character where the first one stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]
ANSWER = "Grüße, 世界! 🎉🎉 <think> no </think> and a STOP that is none, STO; the end."
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "stream": True}
COMPLETION: dict[str, Any] = {"prompt": "Hi", "max_tokens": 300, "stream": True}
MAY_RESUME = {"x-octavo-resumable": "1"}


async def stream(server: Any, path: str, body: Any, headers: Any = MAY_RESUME) -> tuple[list[Any], dict[str, str]]:
    """Every chunk, and the head's lines."""
    async with server.http.post(server.url + path, json=body, headers=headers) as response:
        text = await response.text()
        assert response.status == 200, text
        assert text.endswith("data: [DONE]\n\n")
        events = text.removesuffix("data: [DONE]\n\n").split("\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in events if event], dict(response.headers)


def shown(chunks: list[Any]) -> str:
    parts = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice.get("delta", {"content": choice.get("text")})
            parts.append((delta.get("reasoning") or "") + (delta.get("content") or ""))
    return "".join(parts)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stop": ["STOP it", "never"], "stream_options": {"include_usage": True}}),
        ("/v1/completions", COMPLETION | {"stop": "the end"}),
    ],
)
async def test_cut_after_any_chunk_the_rest_is_the_same(serve: Serve, path: str, body: Any) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: ANSWER))
    other = await serve(FakeEngine(reply=lambda prompt: ANSWER))
    whole, head = await stream(server, path, body)
    assert int(head["x-octavo-resumable"]) == len(next(iter(server.engine.received.values())).prompt_token_ids)

    told: list[int] = []
    for number, chunk in enumerate(whole):
        for choice in chunk["choices"]:
            told += choice.get("token_ids") or []
            if choice["finish_reason"] is not None:
                break
        else:
            if not chunk["choices"]:
                continue
            resume = {"id": chunk["id"], "created": chunk["created"], "token_ids": told}
            rest, resumed_head = await stream(other, path, body | {"octavo_resume": resume})
            assert shown(whole[: number + 1]) + shown(rest) == shown(whole)
            assert {(c["id"], c["created"]) for c in rest} == {(chunk["id"], chunk["created"])}
            assert rest[-1].get("usage") == whole[-1].get("usage")
            assert int(resumed_head["x-octavo-resumed"]) == len(told)
    assert len(told) > 30


async def test_thoughts_go_on_as_thoughts(serve: Serve) -> None:
    answer = "<think>\nLet me see: 1 </thin 2\n</think>\n\nIt is 3."
    servers = [await serve(FakeEngine(reply=lambda prompt: answer), reasoning_parser="think") for _ in range(2)]
    whole, _ = await stream(servers[0], "/v1/chat/completions", CHAT)

    def split(chunks: list[Any]) -> tuple[str, str]:
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        return "".join(d.get("reasoning") or "" for d in deltas), "".join(d.get("content") or "" for d in deltas)

    told: list[int] = []
    for number, chunk in enumerate(whole[:-1]):
        told += chunk["choices"][0].get("token_ids") or []
        resume = {"id": chunk["id"], "created": chunk["created"], "token_ids": told}
        rest, _ = await stream(servers[1], "/v1/chat/completions", CHAT | {"octavo_resume": resume})
        before, after = split(whole[: number + 1]), split(rest)
        assert (before[0] + after[0], before[1] + after[1]) == split(whole)


async def test_only_who_asks_is_told_the_tokens_and_only_where_it_can_work(serve: Serve) -> None:
    server = await serve()
    plain, head = await stream(server, "/v1/chat/completions", CHAT, headers={})
    several, several_head = await stream(server, "/v1/chat/completions", CHAT | {"n": 2})

    assert "x-octavo-resumable" not in head
    assert "x-octavo-resumable" not in several_head
    assert "token_ids" not in json.dumps(plain + several)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 2}, "cannot be resumed"),
        ({"stream": False}, "cannot be resumed"),
        ({"octavo_resume": {"id": "x", "created": 1, "token_ids": [72] * 300}}, "already ended"),
        ({"octavo_resume": {"id": "x", "created": 1, "token_ids": [72, 10**6]}}, "token"),
        ({"octavo_resume": {"id": "x", "created": 1, "token_ids": [72], "more": 1}}, "octavo_resume"),
        ({"octavo_resume": {"id": "x", "created": 1, "token_ids": list(b"STOP")}, "stop": "STOP"}, "already ended"),
    ],
)
async def test_what_cannot_go_on_is_refused(serve: Serve, change: Any, words: str) -> None:
    server = await serve()
    body = CHAT | {"octavo_resume": {"id": "x", "created": 1, "token_ids": [72]}} | change
    status, answer, _ = await server.post("/v1/chat/completions", body)

    assert status == 400
    assert words in answer["error"]["message"]


async def test_an_unseeded_answer_has_a_seed_that_follows_it(serve: Serve) -> None:
    servers = [await serve(), await serve()]
    whole, _ = await stream(servers[0], "/v1/chat/completions", CHAT | {"temperature": 1.0})
    resume = {"id": whole[0]["id"], "created": whole[0]["created"], "token_ids": whole[1]["choices"][0]["token_ids"]}
    await stream(servers[1], "/v1/chat/completions", CHAT | {"temperature": 1.0, "octavo_resume": resume})
    seeds = [received.sampling.seed for server in servers for received in server.engine.received.values()]

    assert seeds[0] is not None
    assert seeds[0] == seeds[1]
