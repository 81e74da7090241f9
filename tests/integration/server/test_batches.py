"""Files and batches with the official client, over a real socket, across restarts and between tenants."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine
from fakes.running_server import RunningServer, running_server

COMPLETIONS = "/v1/completions"


def lines(count: int) -> bytes:
    values = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": COMPLETIONS,
            "body": {"prompt": f"p{i}", "max_tokens": 4},
        }
        for i in range(count)
    ]
    return "".join(json.dumps(value) + "\n" for value in values).encode()


async def start(server: RunningServer, content: bytes, endpoint: Any = COMPLETIONS) -> Any:
    file = await server.openai.files.create(file=("in.jsonl", content), purpose="batch")
    return await server.openai.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"job": "nightly"}
    )


async def ended(server: RunningServer, batch_id: str, client: openai.AsyncOpenAI | None = None) -> Any:
    async with asyncio.timeout(30):
        while True:
            batch = await (client or server.openai).batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "cancelled", "expired"):
                return batch
            await asyncio.sleep(0.02)


async def results(server: RunningServer, file_id: str) -> dict[str, Any]:
    text = (await server.openai.files.content(file_id)).text
    return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


async def test_every_request_of_a_file_is_answered(tmp_path: Path) -> None:
    engine = FakeEngine(reply=lambda prompt: f"<{prompt}>")
    async with running_server(engine, batch_folder=str(tmp_path)) as server:
        wrong = json.dumps({"custom_id": "bad", "url": COMPLETIONS, "body": {"prompt": "x", "top_p": 7}}).encode()
        batch = await start(server, lines(40) + wrong)
        assert batch.status in ("validating", "in_progress")
        batch = await ended(server, batch.id)

        good = await results(server, batch.output_file_id)
        bad = await results(server, batch.error_file_id)

    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (41, 40, 1)
    assert batch.metadata == {"job": "nightly"}
    assert set(good) == {f"r{i}" for i in range(40)}
    assert good["r7"]["response"]["status_code"] == 200
    assert good["r7"]["response"]["body"]["choices"][0]["text"] == "<p7>"
    assert bad["bad"]["response"]["status_code"] == 400
    assert "top_p" in bad["bad"]["error"]["message"]
    assert {received.priority for received in engine.received.values()} == {1_000_000}


async def test_a_batch_goes_on_where_a_killed_server_left_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    first = FakeEngine(step_s=0.1)
    async with running_server(first, batch_folder=folder) as server:
        batch = await start(server, lines(200))
        await eventually(lambda: sum(first.finished.values()) >= 20, 10)
    (left,) = (tmp_path / "results").glob("*.jsonl")
    done = left.read_text().count("\n")
    left.write_text(left.read_text() + '{"custom_id": "r5')  # as if the process had died in the middle of a line

    second = FakeEngine()
    async with running_server(second, batch_folder=folder) as server:
        batch = await ended(server, batch.id)
        good = await results(server, batch.output_file_id)

    assert batch.status == "completed"
    assert batch.request_counts.completed == len(good) == 200
    assert 0 < done < 200
    assert len(second.received) == 200 - done


async def test_a_busy_replica_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo_batches.runner._MAX_WAIT_S", 0.02)
    async with running_server(FakeEngine(max_queued=3, step_s=0.001), batch_folder=str(tmp_path)) as server:
        batch = await ended(server, (await start(server, lines(50))).id)

    assert (batch.request_counts.completed, batch.request_counts.failed) == (50, 0)


async def test_a_cancelled_batch_keeps_what_it_has(tmp_path: Path) -> None:
    engine = FakeEngine(step_s=0.01)
    async with running_server(engine, batch_folder=str(tmp_path)) as server:
        batch = await start(server, lines(500))
        await eventually(lambda: sum(engine.finished.values()) >= 5, 10)
        await server.openai.batches.cancel(batch.id)
        batch = await ended(server, batch.id)
        good = await results(server, batch.output_file_id)

    assert batch.status == "cancelled"
    assert 5 <= len(good) < 500


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "holds no request"),
        (b"nonsense\n", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (lines(1) * 2, "custom_id: 'r0' is used twice"),
        (lines(1).replace(b"/v1/completions", b"/metrics"), "url: must be one of"),
        (lines(1).replace(b"/v1/completions", b"/v1/embeddings"), "url: must be the batch's endpoint"),
        (b"\xff\xfe\x00", "is not valid JSON"),
    ],
)
async def test_a_file_with_a_wrong_line_runs_nothing(tmp_path: Path, content: bytes, named: str) -> None:
    engine = FakeEngine()
    async with running_server(engine, batch_folder=str(tmp_path)) as server:
        batch = await ended(server, (await start(server, content)).id)

    assert batch.status == "failed"
    assert named in batch.errors.data[0].message
    assert not engine.received


async def test_files_and_batches_belong_to_their_tenant(tmp_path: Path) -> None:
    async with running_server(FakeEngine(), batch_folder=str(tmp_path)) as server:
        mine = server.openai.with_options(default_headers={"x-octavo-tenant": "a"})
        file = await mine.files.create(file=("in.jsonl", lines(2)), purpose="batch")
        batch = await mine.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
        batch = await ended(server, batch.id, mine)
        other = server.openai.with_options(default_headers={"x-octavo-tenant": "b"})

        for call in (
            other.files.retrieve(file.id), other.files.content(file.id), other.files.delete(file.id),
            other.files.content(batch.output_file_id), other.batches.retrieve(batch.id), other.batches.cancel(batch.id),
            other.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                await call
        assert [f.id async for f in other.files.list()] == [b.id async for b in other.batches.list()] == []
        assert {received.tenant for received in server.engine.received.values()} == {"a"}


async def test_files_are_listed_in_pages_and_deleted(tmp_path: Path) -> None:
    async with running_server(FakeEngine(), batch_folder=str(tmp_path)) as server:
        made = [await server.openai.files.create(file=("x", b"1"), purpose="batch") for _ in range(5)]
        page = await server.openai.files.list(limit=2)
        listed = [file.id async for file in server.openai.files.list(limit=2)]
        await server.openai.files.delete(made[0].id)

        assert (len(page.data), page.has_more) == (2, True)
        assert sorted(listed) == sorted(file.id for file in made)
        assert len([file async for file in server.openai.files.list()]) == 4
        assert len(list((tmp_path / "files").iterdir())) == 4


@pytest.mark.parametrize("name", ["../../etc/passwd", "file-..", "%2e%2e%2fbatches", "file-" + "0" * 32, "a" * 5_000])
async def test_names_that_are_no_ids_lead_nowhere(tmp_path: Path, name: str) -> None:
    async with running_server(FakeEngine(), batch_folder=str(tmp_path)) as server:
        for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
            async with server.http.get(server.url + path) as response:
                assert response.status == 404


async def test_wrong_requests_name_the_field(tmp_path: Path) -> None:
    async with running_server(FakeEngine(), batch_folder=str(tmp_path)) as server:
        file = await server.openai.files.create(file=("in.jsonl", lines(1)), purpose="batch")
        good = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        for fields, param in (
            ({"endpoint": "/v1/images"}, "endpoint"), ({"completion_window": "1h"}, "completion_window"),
            ({"input_file_id": None}, "input_file_id"), ({"metadata": {"a": 1}}, "metadata"),
        ):  # fmt: skip
            status, answer, _ = await server.post("/v1/batches", {**good, **fields})
            assert (status, answer["error"]["param"].split("[")[0].split("`")[0].rstrip(".")) == (400, param)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await server.openai.files.create(file=("x", b"1"), purpose="vision")
        for data in (b"", b"--x\r\nnonsense", b"{}"):
            headers = {"content-type": "multipart/form-data; boundary=x"}
            async with server.http.post(f"{server.url}/v1/files", data=data, headers=headers) as response:
                assert response.status == 400


async def test_without_a_folder_the_routes_say_what_to_set() -> None:
    async with running_server(FakeEngine()) as server:
        status, answer, _ = await server.post("/v1/batches", {})

    assert status == 501
    assert "--batch-folder" in answer["error"]["message"]
