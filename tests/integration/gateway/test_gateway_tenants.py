"""Tenants at the door: who gets in, what they see, what they may use, and what is written down."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from fakes.gateway_door import HELLO, Door, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from fakes.replica_process import replica_process
from octavo_gateway.registry import Endpoint, HoldPolicy, ModelEntry, Saturation
from octavo_gateway.tenancy import KeyRecord, Limits, Tenant, TenantDirectory, hash_key, new_key
from octavo_gateway.tenancy.budget import Period
from octavo_gateway.tenancy.keys import format_hash
from octavo_gateway.tenancy.source import TenantFiles, load_tenants
from octavo_gateway.usage import Ledger, PriceTable, read_usage

KEY_A, KEY_B = new_key(), new_key()
ADMIN_TOKEN = "a-long-admin-token"


def tenant(name: str, key: str, **fields: Any) -> Tenant:
    return Tenant(name, (KeyRecord(f"{name}-key", hash_key(key)),), **fields)


DIRECTORY = TenantDirectory(
    [tenant("team-a", KEY_A, allowed_models=("m", "shared")), tenant("team-b", KEY_B, allowed_models=("shared",))]
)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


CHAT = "/v1/chat/completions"
ROUTES = [
    # method, path, body, allowed without a key, status for team-a, status for team-b
    ("GET", "/", None, True, 200, 200),
    ("GET", "/health", None, True, 200, 200),
    ("GET", "/health/live", None, True, 200, 200),
    ("GET", "/health/ready", None, True, 200, 200),
    ("GET", "/v2/health/live", None, True, 200, 200),
    ("GET", "/v2/health/ready", None, True, 200, 200),
    ("GET", "/api/state", None, False, 200, 200),
    ("GET", "/api/usage", None, False, 404, 404),  # no ledger here
    ("GET", "/version", None, False, 200, 200),
    ("GET", "/metrics", None, False, 404, 404),
    ("GET", "/v1/models", None, False, 200, 200),
    ("GET", "/v1/models/m", None, False, 200, 404),
    ("POST", "/v1/chat/completions", HELLO, False, 200, 404),
    ("POST", "/v1/completions", {"model": "m", "prompt": "x"}, False, 200, 404),
    ("POST", "/v1/embeddings", {"model": "m", "input": "x"}, False, 200, 404),
    ("POST", "/v1/responses", {"model": "m", "input": "x"}, False, 200, 404),
    ("POST", "/tokenize", {"model": "m", "prompt": "x"}, False, 200, 404),
    ("POST", "/v2/models/m/infer", {"inputs": []}, False, 200, 404),
    ("GET", "/v2/models/m/ready", None, False, 200, 404),
    ("GET", "/v1/files", None, False, 200, 200),
    ("POST", "/v1/files", None, False, 400, 400),  # no form
    ("GET", "/v1/files/file-1", None, False, 404, 404),
    ("GET", "/v1/files/file-1/content", None, False, 404, 404),
    ("DELETE", "/v1/files/file-1", None, False, 404, 404),
    ("GET", "/v1/batches", None, False, 200, 200),
    ("POST", "/v1/batches", {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}, False, 404, 404),
    ("GET", "/v1/batches/batch-1", None, False, 404, 404),
    ("POST", "/v1/batches/batch-1/cancel", None, False, 404, 404),
]


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r[0]} {r[1]}")
async def test_every_route_with_no_key_a_wrong_one_and_another_tenants(route: Any, tmp_path: Path) -> None:
    method, path, body, public, for_a, for_b = route
    options = {"directory": DIRECTORY, "batch_folder": str(tmp_path)}
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), **options) as door:

        async def status(headers: dict[str, str]) -> int:
            async with door.http.request(method, door.url + path, json=body, headers=headers) as response:
                return response.status

        refused = for_a if public else 401
        assert await status({}) == refused
        assert await status(bearer(new_key())) == refused
        assert await status(bearer(KEY_A[:-1])) == refused
        assert await status({"authorization": f"Basic {KEY_A}"}) == refused
        before = len(replica.received)
        assert await status(bearer(KEY_A)) == for_a
        assert await status(bearer(KEY_B)) == for_b
        assert await status({"x-api-key": KEY_A}) == for_a

    assert before == 0  # nobody without a key reached a replica


async def test_unknown_routes_do_not_tell_more_than_that() -> None:
    async with open_door(directory=DIRECTORY) as door:
        for path in ("/admin/tenants", "/admin/usage", "/docs", "/openapi.json", "/debug", "/v1/files"):
            async with door.http.get(door.url + path, headers=bearer(KEY_A)) as response:
                assert response.status == 404


async def test_a_model_that_is_not_allowed_looks_like_one_that_does_not_exist() -> None:
    own, shared = ModelEntry(name="m"), ModelEntry(name="shared")
    async with open_door(own, shared, directory=DIRECTORY) as door:
        _, hidden, _ = await door.read(HELLO, headers=bearer(KEY_B))
        _, absent, _ = await door.read(HELLO | {"model": "zzz"}, headers=bearer(KEY_B))
        async with door.http.get(door.url + "/v1/models", headers=bearer(KEY_B)) as response:
            models = [card["id"] for card in (await response.json())["data"]]
        async with door.http.get(door.url + "/api/state", headers=bearer(KEY_B)) as response:
            shown = [model["name"] for model in (await response.json())["models"]]

    assert hidden.replace("'m'", "X") == absent.replace("'zzz'", "X")
    assert models == shown == ["shared"]


async def test_the_replica_learns_the_tenant_from_the_key_alone() -> None:
    spoofed = bearer(KEY_A) | {"x-octavo-tenant": "team-b", "x-octavo-priority": "-99"}
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), directory=DIRECTORY) as door:
        await door.read(HELLO | {"priority": -50}, headers=spoofed)

    seen = replica.received[0].headers
    assert seen["x-octavo-tenant"] == "team-a"
    assert seen["x-octavo-priority"] == "0"
    assert 0 < int(seen["x-octavo-deadline-ms"]) <= 3_600_000
    assert "authorization" not in seen


async def test_equal_prompts_of_two_tenants_share_no_prefix_hash() -> None:
    body = {"model": "shared", "messages": [{"role": "user", "content": "long " * 500}]}
    from octavo_gateway.registry import Strategy

    async with OpenAIReplica("r").serve() as replica:
        shared = entry(replica, name="shared", strategy=Strategy.PREFIX_AWARE)
        async with open_door(shared, directory=DIRECTORY) as door:
            await door.read(body, headers=bearer(KEY_A))
            blocks = len(door.server.app.index)
            await door.read(body, headers=bearer(KEY_A))
            again = len(door.server.app.index)
            await door.read(body, headers=bearer(KEY_B))
            both = len(door.server.app.index)

    assert blocks > 0
    assert (again, both) == (blocks, 2 * blocks)


async def test_limits_answer_429_with_a_time_and_the_ratelimit_headers() -> None:
    limits = Limits(requests_per_minute=2, tokens_per_minute=100_000)
    directory = TenantDirectory([tenant("t", KEY_A, limits=limits)])
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), directory=directory) as door:
        answers = [await door.read(HELLO, headers=bearer(KEY_A)) for _ in range(3)]

    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert answers[0][2]["x-ratelimit-limit-requests"] == "2"
    assert answers[0][2]["x-ratelimit-remaining-requests"] == "1"
    assert json.loads(answers[2][1])["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2][2]["retry-after"]) <= 30
    assert answers[2][2]["x-ratelimit-remaining-requests"] == "0"


async def test_concurrency_is_freed_when_a_client_leaves() -> None:
    directory = TenantDirectory([tenant("t", KEY_A, limits=Limits(max_concurrent_requests=1))])
    replica = OpenAIReplica(tokens=1_000, token_delay=0.05)
    async with replica.serve(), open_door(entry(replica), directory=directory) as door:
        running = asyncio.ensure_future(door.events(HELLO, headers=bearer(KEY_A)))
        await until(lambda: replica.running == 1)
        refused, _, _ = await door.read(HELLO, headers=bearer(KEY_A))
        running.cancel()
        await until(lambda: door.server.app.accounts.limiter.running() == {})
        replica.tokens = 1
        accepted, _, _ = await door.read(HELLO, headers=bearer(KEY_A))

    assert (refused, accepted) == (429, 200)


async def test_a_suspended_tenant_and_a_revoked_key_are_refused() -> None:
    suspended = TenantDirectory([tenant("t", KEY_A, suspended=True)])
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), directory=suspended) as door:
        first, _, _ = await door.read(HELLO, headers=bearer(KEY_A))
        door.server.app.accounts.set_directory(TenantDirectory())
        second, _, _ = await door.read(HELLO, headers=bearer(KEY_A))

    assert (first, second) == (403, 401)
    assert replica.received == []


async def test_a_key_removed_from_the_file_is_refused_without_a_restart(tmp_path: Path) -> None:
    manifest = (
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceTenant\nmetadata: {name: t}\n"
        "spec: {keySecretRefs: [{name: keys}]}\n---\nkind: Secret\nmetadata: {name: keys}\nstringData: DATA\n"
    )
    path = tmp_path / "tenants.yaml"
    path.write_text(manifest.replace("DATA", json.dumps({"k": format_hash(hash_key(KEY_A))})))
    async with OpenAIReplica().serve() as replica, open_door(entry(replica), directory=load_tenants(path)) as door:
        files = TenantFiles(path)
        files.load()
        following = asyncio.ensure_future(files.run(door.server.app.accounts.set_directory))
        first, _, _ = await door.read(HELLO, headers=bearer(KEY_A))
        path.write_text(manifest.replace("DATA", json.dumps({"k": format_hash(hash_key(KEY_B))})))
        await until(lambda: door.server.app.accounts.directory.authenticate(KEY_B) is not None)
        revoked, _, _ = await door.read(HELLO, headers=bearer(KEY_A))
        rotated, _, _ = await door.read(HELLO, headers=bearer(KEY_B))
        path.write_text("kind: Nonsense")
        await asyncio.sleep(1.2)
        kept, _, _ = await door.read(HELLO, headers=bearer(KEY_B))
        following.cancel()

    assert (first, revoked, rotated, kept) == (200, 401, 200, 200)


async def test_a_noisy_tenant_leaves_the_other_its_share_of_a_saturated_model() -> None:
    replica = OpenAIReplica("r", tokens=2, token_delay=2.0)  # slow until all are in line
    replica.metrics = "octavo_requests_waiting 0\noctavo_requests_running 0\noctavo_max_num_seqs 2\n"
    line = {"saturation": Saturation(queue_depth=1), "hold": HoldPolicy(1_000, 60)}
    body = HELLO | {"model": "shared"}
    order: list[str] = []

    async def ask(door: Door, key: str, name: str) -> None:
        status, _, _ = await door.read(body, headers=bearer(key))
        assert status == 200
        order.append(name)

    async with (
        replica.serve(),
        open_door(entry(replica, name="shared", **line), directory=DIRECTORY, connect_timeout=30) as door,
    ):
        await until(lambda: door.server.app.loads["r"].report is not None)
        noisy = [asyncio.ensure_future(ask(door, KEY_A, "noisy")) for _ in range(150)]
        await until(lambda: door.server.app.signals("shared").arrivals_total == 150)
        quiet = [asyncio.ensure_future(ask(door, KEY_B, "quiet")) for _ in range(10)]
        await until(lambda: door.server.app.signals("shared").arrivals_total == 160)
        replica.token_delay = 0.001
        await asyncio.gather(*quiet)
        served_before = order.count("noisy")
        await asyncio.gather(*noisy)

    assert served_before <= 75  # without fair queueing all 150 would have gone first


async def test_streams_count_tokens_whether_or_not_the_client_asked_to_see_them(tmp_path: Path) -> None:
    replica = OpenAIReplica(tokens=4, cached_tokens=3)
    prices = PriceTable.parse({"m": {"input": 1_000, "output": 10_000}}, "test")
    ledger = Ledger(tmp_path)
    async with replica.serve(), open_door(entry(replica), directory=DIRECTORY, ledger=ledger, prices=prices) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=KEY_A, max_retries=0)
        for asked in (False, True):
            options: Any = {"stream_options": {"include_usage": True}} if asked else {}
            stream = await client.chat.completions.create(model="m", messages=HELLO["messages"], stream=True, **options)
            chunks = [chunk async for chunk in stream]
            assert (chunks[-1].usage is not None) == asked
        await door.read(HELLO, headers=bearer(KEY_A))
        await client.close()
        async with door.http.get(door.url + "/v1/models", headers=bearer(KEY_A)) as response:
            assert response.status == 200
    ledger.close()

    (row,) = read_usage(tmp_path / "usage.sqlite", ("tenant", "key", "model"))
    assert row.group == ("team-a", "team-a/team-a-key", "m")
    assert (row.requests, row.prompt_tokens, row.cached_tokens, row.output_tokens) == (3, 21, 9, 12)
    assert row.estimated == 0
    assert row.cost == pytest.approx(3 * (7 * 1_000 + 4 * 10_000) / 1e6)


async def test_the_ledger_has_each_of_many_mixed_requests_once_and_the_engines_counts(tmp_path: Path) -> None:
    """Whole and streamed answers, clients that leave, replicas that die, refusals, unknown models, wrong keys."""
    rng = random.Random(3)
    good = OpenAIReplica("good", tokens=6, token_delay=0.001)
    dying = OpenAIReplica("dying", tokens=6, die_after=2)
    outcomes = {"finished": 0, "left": 0}
    ledger = Ledger(tmp_path)

    async def one(door: Door, number: int) -> None:
        headers = bearer(KEY_A if number % 9 else "wrong")
        body = HELLO | {"model": rng.choice(["m", "m", "m", "shared", "nope"]), "stream": rng.random() < 0.6}
        call = asyncio.ensure_future(door.read(body, headers=headers))
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.02)
            call.cancel()
        try:
            await call
            outcomes["finished"] += 1
        except asyncio.CancelledError:
            outcomes["left"] += 1
        except Exception:  # a broken-off whole answer
            outcomes["finished"] += 1

    async with good.serve(), dying.serve():
        models = (entry(good), entry(dying, name="shared"))
        async with open_door(*models, directory=DIRECTORY, ledger=ledger, access_log=False) as door:
            for start in range(0, 600, 60):
                await asyncio.gather(*(one(door, number) for number in range(start, start + 60)))
            await until(lambda: door.server.app.in_flight == 0 and door.server.app.accounts.num_unsettled == 0)
            charged = sum(
                metric.value
                for family in door.server.app.metrics.registry.collect()
                for metric in family.samples
                if metric.name == "octavo_gateway_requests_total" and metric.labels["model"]
            )
            page = door.server.app.metrics.page().decode()
    ledger.close()
    rows = {row.group: row for row in read_usage(tmp_path / "usage.sqlite", ("model", "outcome"))}

    assert sum(row.requests for row in rows.values()) == charged > 300
    ok = rows[("m", "ok")]
    assert (ok.prompt_tokens, ok.output_tokens, ok.estimated) == (7 * ok.requests, 6 * ok.requests, 0)
    cancelled = rows[("m", "cancelled")]
    assert cancelled.output_tokens <= 7 * cancelled.requests
    outputs = sum(row.output_tokens for group, row in rows.items() if group[0] == "m")
    assert f'octavo_gateway_tokens_total{{kind="output",model="m"}} {float(outputs)}' in page
    assert outcomes["left"] > 50


async def test_the_admin_api_has_its_own_port_and_token(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    limited = tenant("team-a", KEY_A, display_name="Team A", limits=Limits(requests_per_minute=60))
    settings = {"admin_port": 0, "admin_token": ADMIN_TOKEN}
    async with (
        OpenAIReplica("r").serve() as replica,
        open_door(entry(replica), directory=TenantDirectory([limited]), ledger=ledger, **settings) as door,
    ):
        admin = door.server.listeners.admin_address
        await door.read(HELLO, headers=bearer(KEY_A))

        async def get(path: str, token: str | None = ADMIN_TOKEN, method: str = "GET") -> tuple[int, Any]:
            headers = {} if token is None else bearer(token)
            async with door.http.request(method, f"{admin}{path}", headers=headers) as response:
                text = await response.text()
                return response.status, json.loads(text) if text.startswith("{") else text

        refused = [(await get(path, token))[0] for path in ("/admin/tenants", "/nope") for token in (None, "x", KEY_A)]
        _, tenants = await get("/admin/tenants")
        _, usage = await get("/admin/usage?by=tenant,model")
        wrong = [(await get(f"/admin/usage?{query}"))[0] for query in ("by=tenant;drop", "since=yesterday")]
        _, metrics = await get("/metrics", None)
        ready, _ = await get("/health/ready", None)
        _, fresh = await get("/admin/keys", method="POST")
        _, state = await get("/admin/state")

    ledger.close()
    assert refused == [401] * 6
    assert tenants["tenants"][0]["keys"] == ["team-a-key"]
    assert tenants["tenants"][0]["limits"] == {"requests_per_minute": 60}
    assert "digest" not in json.dumps(tenants)
    assert usage["rows"][0] | {"cost": 0} == {
        "tenant": "team-a",
        "model": "m",
        "requests": 1,
        "prompt_tokens": 7,
        "cached_tokens": 0,
        "output_tokens": 5,
        "estimated_requests": 0,
        "cost": 0,
    }
    assert wrong == [400, 400]
    assert "octavo_gateway_requests_total" in metrics
    assert ready == 200
    assert format_hash(hash_key(fresh["key"])) == fresh["hash"]
    assert state["models"][0]["name"] == "m"


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_metrics_do_not_grow_with_tenants_or_invented_names(count: int) -> None:
    many = TenantDirectory(tenant(f"t{i}", f"key-{i}") for i in range(count))

    async def ask(door: Door, numbers: range) -> None:
        for start in range(numbers.start, numbers.stop, 200):
            batch = range(start, min(start + 200, numbers.stop))
            await asyncio.gather(*(door.read(HELLO, headers=bearer(f"key-{i}")) for i in batch))

    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica), directory=many, connect_timeout=30) as door,
    ):
        await ask(door, range(10))
        small = len(door.server.app.metrics.page().splitlines())
        await ask(door, range(10, count))
        await asyncio.gather(*(door.read(HELLO | {"model": f"x{i}"}, headers=bearer("key-1")) for i in range(50)))
        large = len(door.server.app.metrics.page().splitlines())

    assert large - small < 10


async def test_held_requests_per_tenant_are_bounded() -> None:
    directory = TenantDirectory([tenant("t", KEY_A, limits=Limits(max_queued_requests=2))])
    cold = ModelEntry(name="m", scale_to_zero=True, desired_replicas=0)
    async with open_door(cold, directory=directory) as door:
        held = [asyncio.ensure_future(door.read(HELLO, headers=bearer(KEY_A))) for _ in range(2)]
        await until(lambda: door.server.app.signals("m").held == 2)
        status, text, _ = await door.read(HELLO, headers=bearer(KEY_A))
        for task in held:
            task.cancel()

    assert status == 429
    assert "2 waiting requests" in text


@pytest.mark.parametrize("streamed", [False, True])
async def test_leaving_early_does_not_evade_a_token_limit(streamed: bool) -> None:
    """The replica tells what was generated for a client that left, and the tenant is charged with it."""
    directory = TenantDirectory([tenant("t", KEY_A)])
    body = {
        "model": "fake-model", "messages": HELLO["messages"], "max_tokens": 4_000, "ignore_eos": True,
        "stream": streamed,
    }  # fmt: skip
    with replica_process({"step_s": 0.002}) as url:
        model = ModelEntry(name="fake-model", endpoints=(Endpoint("r", url),))
        async with open_door(model, directory=directory, connect_timeout=30) as door:

            async def counted(pattern: str) -> int:
                async with door.http.get(f"{url}/metrics") as response:
                    return sum(int(float(value)) for value in re.findall(pattern, await response.text()))

            asking = asyncio.ensure_future(door.read(body, headers=bearer(KEY_A)))
            while await counted(r"octavo_generation_tokens_total{\S+ (\S+)") < 50:
                await asyncio.sleep(0.02)
            asking.cancel()
            accounts = door.server.app.accounts
            await until(lambda: door.server.app.in_flight == 0 and accounts.num_unsettled == 0)
            spent = accounts.limiter._account("t").spent(Period.DAY, accounts._today()).tokens
            told = await counted(r'octavo_usage_tokens_total{kind="(?:prompt|output)"} (\S+)')

    assert told > 50
    assert spent == told
