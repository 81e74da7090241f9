"""Probes, metrics and the small routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from fakes.fake_engine import FakeEngine
from octavo_engine.errors import EngineDeadError, ModelLoadError
from octavo_engine.messages import SchedulerSnapshot

Serve = Callable[..., Any]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def get(server: Any, path: str) -> tuple[int, Any]:
    async with server.http.get(server.url + path) as response:
        return response.status, await response.json(content_type=None)


async def test_while_loading_it_is_alive_but_not_ready_and_says_how_far_it_is(serve: Serve) -> None:
    server = await serve(FakeEngine(load_s=5), load=False)
    loading = asyncio.create_task(server.replica.start())
    await asyncio.sleep(0.05)

    assert (await get(server, "/health/live"))[0] == 200
    status, body = await get(server, "/health/ready")
    assert status == 503
    assert body == {
        "status": "starting",
        "progress": {"phase": "weights", "fraction": 0.5, "detail": "1 of 2 files"},
    }
    refused, _, headers = await server.post("/v1/chat/completions", CHAT)
    assert (refused, headers["retry-after"]) == (503, "5")
    assert (await get(server, "/v1/models"))[0] == 503
    loading.cancel()


async def test_a_dead_engine_fails_both_probes_and_new_requests(serve: Serve) -> None:
    server = await serve()
    assert (await get(server, "/health/ready"))[0] == 200

    server.engine.dead = "killed by signal 9"

    assert await get(server, "/health/live") == (503, {"status": "failed", "reason": "killed by signal 9"})
    for path in ("/health/ready", "/health", "/ping"):
        assert (await get(server, path))[0] == 503
    status, body, headers = await server.post("/v1/chat/completions", CHAT)
    assert status == 503
    assert "retry-after" in headers
    assert "signal" not in body["error"]["message"]


async def test_a_failed_load_is_reported_by_the_probes(serve: Serve) -> None:
    server = await serve(FakeEngine(load_error=ModelLoadError("no such file")), load=False)

    server.replica.lifecycle.fail("no such file")

    assert await get(server, "/health/ready") == (503, {"status": "failed", "reason": "no such file"})


async def test_metrics_carry_our_names_and_vllms(serve: Serve) -> None:
    server = await serve()
    await server.post("/v1/chat/completions", CHAT)
    async with server.http.get(f"{server.url}/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model_name", "fake-model") == "fake-model"
    }

    for name in ("requests_waiting", "requests_running", "kv_cache_utilization", "queued_kv_tokens"):
        assert f"octavo_{name}" in values
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert f"vllm:{name}" in values
    for prefix in ("octavo_", "vllm:"):
        assert values[f"{prefix}generation_tokens_total"] == 28
        assert values[f"{prefix}time_to_first_token_seconds_count"] == 1
        assert values[f"{prefix}e2e_request_latency_seconds_count"] == 1
        assert values[f"{prefix}request_success_total"] == 1
        assert values[f"{prefix}prefix_cache_queries_total"] == 0
    assert values["octavo_engine_steps_ahead_total"] == 0
    assert values["octavo_build_info"] == 1
    assert values["octavo_max_num_seqs"] == server.replica.settings.max_num_seqs
    assert values["octavo_max_model_len"] > 0
    assert values["octavo_model_info"] == 1
    assert values["octavo_kv_cache_capacity_tokens"] == 1_024 * 16
    assert 'vllm:cache_config_info{block_size="16"' in text


async def test_models_lists_every_served_name(serve: Serve) -> None:
    server = await serve()

    models = await server.openai.models.list()
    alias = await server.openai.models.retrieve("alias")

    assert [model.id for model in models.data] == ["fake-model", "alias"]
    assert alias.id == "alias"
    assert (await get(server, "/v1/models/other"))[0] == 404


async def test_tokenize_and_detokenize_are_inverse(serve: Serve) -> None:
    server = await serve()

    _, tokens, _ = await server.post("/tokenize", {"prompt": "héllo", "return_token_strs": True})
    _, text, _ = await server.post("/detokenize", {"tokens": tokens["tokens"][1:]})
    _, chat, _ = await server.post("/tokenize", CHAT)

    assert text["prompt"] == "héllo"
    assert tokens["count"] == 7
    assert tokens["token_strs"][:2] == ["<s>", "h"]
    assert chat["count"] == len("<user>Hi<assistant>")


async def test_small_routes(serve: Serve) -> None:
    server = await serve()

    assert "version" in (await get(server, "/version"))[1]
    assert (await get(server, "/load")) == (200, {"server_load": 0})
    assert (await server.post("/ping", {}))[0] == 200
    status, body = await get(server, "/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "NotFoundError")
    status, body = await get(server, "/v1/chat/completions")
    assert (status, body["error"]["type"]) == (405, "MethodNotAllowedError")


async def test_the_scheduler_is_shown_only_where_debug_routes_are_on(serve: Serve) -> None:
    class Engine(FakeEngine):
        async def snapshot(self, *, request_id: str) -> list[SchedulerSnapshot]:
            if self.dead:
                raise EngineDeadError(self.dead)
            return [SchedulerSnapshot(
                time=1.0, num_running=0, num_waiting=2, kv_blocks_free=3, kv_blocks_total=4, step_seconds={},
                virtual_tokens={"t": 1.0}, sequences=[], num_left_out=2,
            )]  # fmt: skip

    assert (await get(await serve(Engine()), "/debug/scheduler"))[0] == 404
    server = await serve(Engine(), debug_routes=True)

    status, body = await get(server, "/debug/scheduler")
    assert status == 200
    assert body["engines"][0]["virtual_tokens"] == {"t": 1.0}
    server.engine.dead = "killed"
    assert (await get(server, "/debug/scheduler"))[0] == 503


async def test_the_openapi_document_describes_every_body(serve: Serve) -> None:
    server = await serve()

    status, document = await get(server, "/openapi.json")

    assert status == 200
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert "messages" in schema["required"]
    assert schema["properties"]["temperature"]
