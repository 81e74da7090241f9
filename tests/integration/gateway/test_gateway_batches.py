"""Files and batches at the gateway, with the official client: whole, bounded, apart, and exact over restarts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from hashlib import blake2s
from pathlib import Path
from typing import Any

import openai
import pytest

from fakes.gateway_door import Door, entry, open_door, until
from fakes.gateway_site import site
from fakes.openai_replica import OpenAIReplica
from octavo_batches.api import BatchApi, CreateBatch
from octavo_batches.store import BatchStore, StoreLimits
from octavo_gateway.batches import MAX_RUNNING_OF_TENANT
from octavo_gateway.tenancy import KeyRecord, Limits, Tenant, TenantDirectory, hash_key, new_key
from octavo_gateway.usage import Ledger

KEY_A, KEY_B = new_key(), new_key()
CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")


def directory(limits: Limits | None = None) -> TenantDirectory:
    def tenant(name: str, key: str, **fields: Any) -> Tenant:
        return Tenant(name, (KeyRecord("key", hash_key(key)),), **fields)

    return TenantDirectory(
        [tenant("team-a", KEY_A, limits=limits or Limits()), tenant("team-b", KEY_B, allowed_models=("other",))]
    )


def lines(count: int, model: str = "m") -> bytes:
    def line(number: int) -> dict[str, Any]:
        body = {
            "model": model,
            "max_tokens": 3,
            "priority": -5,
            "messages": [{"role": "user", "content": f"n{number}"}],
        }
        return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}

    return "".join(json.dumps(line(number)) + "\n" for number in range(count)).encode()


@contextlib.asynccontextmanager
async def client_of(url: str, key: str = KEY_A, max_retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=max_retries) as client:
        yield client


async def start(client: openai.AsyncOpenAI, content: bytes) -> Any:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "nightly"}
    )


async def ended(client: openai.AsyncOpenAI, batch_id: str, timeout_s: float = 60) -> Any:
    async with asyncio.timeout(timeout_s):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ENDED:
                return batch
            await asyncio.sleep(0.05)


async def results(client: openai.AsyncOpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


def records(folder: Path) -> list[tuple[str, str, str, str]]:
    with contextlib.closing(sqlite3.connect(folder / "usage.sqlite")) as database:
        return database.execute("SELECT request_id, tenant, key, outcome FROM usage").fetchall()


async def test_every_line_is_answered_after_everybody_and_booked_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica), directory=directory(), ledger=ledger, batch_folder=str(tmp_path / "b")) as door,
        client_of(door.url) as client,
    ):
        unknown = lines(1, "nobody").replace(b"r0", b"other")
        batch = await ended(client, (await start(client, lines(60) + unknown)).id)
        good = await results(client, batch.output_file_id)
        (bad,) = await results(client, batch.error_file_id)
        heard = {request.headers["x-octavo-priority"] for request in replica.received}
        tenants = {request.headers["x-octavo-tenant"] for request in replica.received}
    await asyncio.to_thread(ledger.close)

    assert (batch.status, batch.metadata) == ("completed", {"job": "nightly"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (61, 60, 1)
    assert sorted(line["custom_id"] for line in good) == sorted(f"r{n}" for n in range(60))
    assert all(line["response"]["body"]["choices"] for line in good)
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("other", 404)
    assert (heard, tenants) == ({"1000000"}, {"team-a"})
    booked = [r for r in records(tmp_path / "ledger") if r[3] == "ok"]
    assert len(booked) == len({r[0] for r in booked}) == 60
    assert {(r[1], r[2]) for r in booked} == {("team-a", "batch")}


async def test_nobody_sees_what_another_tenant_has(tmp_path: Path) -> None:
    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica), directory=directory(), batch_folder=str(tmp_path)) as door,
        client_of(door.url) as mine,
        client_of(door.url, KEY_B) as other,
        client_of(door.url, new_key()) as nobody,
    ):
        batch = await ended(mine, (await start(mine, lines(2))).id)
        own = await other.files.create(file=("in.jsonl", lines(2)), purpose="batch")
        for client, refusal in ((other, openai.NotFoundError), (nobody, openai.AuthenticationError)):
            for call in (
                client.files.retrieve(batch.input_file_id),
                client.files.content(batch.output_file_id),
                client.files.delete(batch.output_file_id),
                client.batches.retrieve(batch.id),
                client.batches.cancel(batch.id),
                client.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
            ):
                with pytest.raises(refusal):
                    await call
        assert [file.id async for file in other.files.list()] == [own.id]
        assert [found.id async for found in other.batches.list()] == []
        assert {file.id async for file in mine.files.list()} == {batch.input_file_id, batch.output_file_id}
        not_allowed = await ended(other, (await start(other, lines(2))).id)
        refused = await results(other, not_allowed.error_file_id)
    assert {line["response"]["status_code"] for line in refused} == {404}, "the tenant may not use this model"


async def test_a_batch_leaves_room_for_its_tenants_people_and_waits_for_limits(tmp_path: Path) -> None:
    limits = Limits(max_concurrent_requests=4, requests_per_minute=1_200)
    async with (
        OpenAIReplica(token_delay=0.01).serve() as replica,
        open_door(entry(replica), directory=directory(limits), batch_folder=str(tmp_path)) as door,
        client_of(door.url) as client,
    ):
        batch, second = await start(client, lines(40)), await start(client, lines(40))
        await until(lambda: replica.running > 0)
        for _ in range(5):
            answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            assert answer.choices
        batch, second = await ended(client, batch.id), await ended(client, second.id)
    for counts in (batch.request_counts, second.request_counts):
        assert (counts.completed, counts.failed) == (40, 0)
    assert replica.peak_running <= 3, "half of what the tenant may have at a time, and one that is waited for"


async def test_a_tenants_batches_run_some_at_a_time_and_all_of_them_in_the_end(tmp_path: Path) -> None:
    async with (
        OpenAIReplica(token_delay=0.005).serve() as replica,
        open_door(entry(replica), batch_folder=str(tmp_path)) as door,
        client_of(door.url) as client,
    ):
        made = [await start(client, lines(10)) for _ in range(9)]
        batches = door.server.app.batches
        assert batches is not None
        most = 0
        for batch in made:
            while (await client.batches.retrieve(batch.id)).status not in ENDED:
                most = max(most, len(batches._runner._tasks))
        statuses = {(await client.batches.retrieve(batch.id)).status for batch in made}
    assert statuses == {"completed"}
    assert most <= MAX_RUNNING_OF_TENANT


async def test_a_replica_that_dies_costs_no_line(tmp_path: Path) -> None:
    async with (
        OpenAIReplica(drop_before_head=True).serve() as replica,
        open_door(entry(replica), batch_folder=str(tmp_path)) as door,
        client_of(door.url) as client,
    ):
        batch = await start(client, lines(20))
        await until(lambda: len(replica.received) >= 20)
        replica.drop_before_head = False
        batch = await ended(client, batch.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 0)


async def test_a_batch_whose_results_cannot_be_kept_fails_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: object, request: object, answer: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo_batches.runner._Progress.keep", no_space)
    async with (
        OpenAIReplica().serve() as replica,
        open_door(entry(replica), batch_folder=str(tmp_path)) as door,
        client_of(door.url) as client,
    ):
        batch = await ended(client, (await start(client, lines(5))).id)
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "storage"


async def test_a_cancelled_batch_keeps_what_it_has(tmp_path: Path) -> None:
    async with (
        OpenAIReplica(token_delay=0.02).serve() as replica,
        open_door(entry(replica), batch_folder=str(tmp_path)) as door,
        client_of(door.url) as client,
    ):
        batch = await start(client, lines(500))
        await until(lambda: replica.finished >= 20)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch.id)
        good = await results(client, batch.output_file_id)
    assert batch.status == "cancelled"
    assert 20 <= len(good) == batch.request_counts.completed < 500


async def test_a_drained_gateway_leaves_its_batch_to_the_next(tmp_path: Path) -> None:
    async with OpenAIReplica(token_delay=0.01).serve() as replica:
        async with _served(replica, tmp_path) as (_, client):
            batch = await start(client, lines(150))
            await until(lambda: replica.finished >= 30)
        before = replica.finished
        async with _served(replica, tmp_path) as (_, client):
            batch = await ended(client, batch.id)
            good = await results(client, batch.output_file_id)
    assert 30 <= before < 150
    assert (batch.status, batch.request_counts.completed) == ("completed", 150)
    assert sorted(line["custom_id"] for line in good) == sorted(f"r{n}" for n in range(150))
    assert len(replica.received) == 150, "what was under way was finished, and nothing was asked twice"


@contextlib.asynccontextmanager
async def _served(replica: OpenAIReplica, folder: Path) -> AsyncIterator[tuple[Door, openai.AsyncOpenAI]]:
    async with open_door(entry(replica), batch_folder=str(folder)) as door, client_of(door.url) as client:
        yield door, client


@pytest.mark.parametrize("flags", [(), ("--workers", "2")])
async def test_kills_of_the_gateway_cost_no_line_and_book_none_twice(tmp_path: Path, flags: tuple[str, ...]) -> None:
    flags = ("--batch-folder", str(tmp_path / "b"), *flags)
    async with site(tmp_path, 1, flags) as running, client_of(running.url, max_retries=5) as client:
        batch = await start(client, lines(600, "fake-model").replace(b'"max_tokens": 3', b'"max_tokens": 40'))
        for _ in range(3):
            await _progress(client, batch.id)
            await running.end_gateway(signal.SIGKILL)
            await running.start_gateway()
        batch = await ended(client, batch.id)
        good = await results(client, batch.output_file_id)
        while running.num_open():
            await asyncio.sleep(0.1)
        await running.end_gateway(signal.SIGTERM)
        booked = Counter(r[0] for r in records(tmp_path / "ledger") if r[3] == "ok")
        interrupted = [r for r in records(tmp_path / "ledger") if r[3] == "interrupted"]

    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 600, 0)
    assert sorted(line["custom_id"] for line in good) == sorted(f"r{n}" for n in range(600))
    assert max(booked.values()) == 1, "a line is booked twice"
    assert set(booked) | {r[0] for r in interrupted} == {f"{batch.id}:{_digest(n)}" for n in range(600)}


def _digest(number: int) -> str:
    return blake2s(f"r{number}".encode(), digest_size=8).hexdigest()


async def _progress(client: openai.AsyncOpenAI, batch_id: str) -> None:
    """Wait until some more lines are answered."""
    seen = (await client.batches.retrieve(batch_id)).request_counts.completed
    async with asyncio.timeout(30):
        while (await client.batches.retrieve(batch_id)).request_counts.completed <= seen:
            await asyncio.sleep(0.05)


async def test_uploads_are_bounded_and_their_forms_are_checked(tmp_path: Path) -> None:
    settings = {"batch_folder": str(tmp_path), "batch_file_bytes": 2_000, "batch_tenant_bytes": 3_000}
    async with open_door(directory=directory(), **settings) as door, client_of(door.url) as client:
        with pytest.raises(openai.APIStatusError) as too_large:
            await client.files.create(file=("x", b"x" * 3_000_000), purpose="batch")
        await client.files.create(file=("x", b"x" * 1_900), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="delete some"):
            await client.files.create(file=("x", b"x" * 1_900), purpose="batch")
        await client.files.create(file=("x", b"x" * 100), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.files.create(file=("x", b"x"), purpose="fine-tune")
        headers = {"authorization": f"Bearer {KEY_A}"}
        async with door.http.post(door.url + "/v1/files", data=b"no form", headers=headers) as response:
            assert response.status == 400
        async with door.http.post(door.url + "/v1/batches", data=b"[" * 10_000, headers=headers) as response:
            assert response.status == 400
        async with door.http.put(door.url + "/v1/files", headers=headers) as response:
            assert response.status == 405
        async with door.http.get(door.url + "/v1/files/../../etc/passwd", headers=headers) as response:
            assert response.status == 404
        async with door.http.get(door.url + "/v1/filesystem", headers=headers) as response:
            assert response.status == 404
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            await client.batches.create(input_file_id="x", endpoint="/v1/nonsense", completion_window="24h")  # type: ignore[arg-type]
    assert too_large.value.status_code == 413
    assert len(list((tmp_path / "files").iterdir())) == 2, "what was refused is not kept"


def test_files_and_ended_batches_go_when_their_time_is_over(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, StoreLimits(10, 10, 10, retention_s=100))
    api = BatchApi(store, lambda record: None)
    read = api.upload("t", "read", "batch", io.BytesIO(b"x"))
    idle = api.upload("t", "idle", "batch", io.BytesIO(b"y"))
    batch = api.create("t", CreateBatch(input_file_id=read["id"], endpoint=CHAT, completion_window="24h"))
    now = time.time()
    assert store.purge(now) == 0
    assert store.purge(now + 101) == 1
    assert [file.id for file in store.files("t")] == [read["id"]], "an open batch still reads it"
    (record,) = store.open_batches()
    record.status = "completed"
    store.save(record)
    assert store.purge(now + 101) == 2
    assert (store.files("t"), store.batches("t")) == ([], [])
    assert not list((tmp_path / "files").iterdir())
    assert (idle["expires_at"], batch["status"]) == (idle["created_at"] + 100, "validating")
    store.close()
