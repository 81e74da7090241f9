"""Every limit of the table is met by a request that breaks it, with an error that names the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fakes.asgi_client import asgi_call
from fakes.byte_tokenizer import ByteTokenizer
from fakes.eventually import eventually
from fakes.fake_engine import FakeEngine
from octavo_server.app import build_app
from octavo_server.limits import LIMITS, Limits
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = {"role": "user", "content": "Hi"}
HELD_ELSEWHERE = {  # by tests over real sockets and real time, of this folder's siblings, or no bound of requests
    "head_bytes", "head_read_timeout_s", "body_read_timeout_s", "stored_files", "open_batches", "batch_lines",
    "listed_names",
}  # fmt: skip


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [USER], **fields}


def complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "Hi", **fields}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


BREACHES: dict[str, tuple[tuple[str, dict[str, Any]], int, str]] = {
    "body_bytes": (complete(user="x" * LIMITS.body_bytes), 413, ""),
    "messages": (chat(messages=[USER] * (LIMITS.messages + 1)), 400, "messages"),
    "content_parts": (
        chat(messages=[{"role": "user", "content": ["a"] * (LIMITS.content_parts + 1)}]), 400, "messages[0].content"),
    "tools": (chat(tools=[{"type": "function", "function": {"name": "f"}}] * (LIMITS.tools + 1)), 400, "tools"),
    "prompts": (complete(prompt=["a"] * (LIMITS.prompts + 1)), 400, "prompt"),
    "sequences": (complete(prompt=["a"] * 5, n=LIMITS.n), 400, "n"),
    "n": (complete(n=LIMITS.n + 1), 400, "n"),
    "best_of": (complete(best_of=LIMITS.best_of + 1), 400, "best_of"),
    "logprobs": (complete(logprobs=LIMITS.logprobs + 1), 400, "logprobs"),
    "max_tokens": (complete(max_tokens=LIMITS.max_tokens + 1), 400, "max_tokens"),
    "prompt_token_id": (complete(prompt=[LIMITS.prompt_token_id + 1]), 400, "prompt[0]"),
    "stop_token_ids": (complete(stop_token_ids=[1] * (LIMITS.stop_token_ids + 1)), 400, "stop_token_ids"),
    "allowed_token_ids": (complete(allowed_token_ids=[1] * (LIMITS.allowed_token_ids + 1)), 400, "allowed_token_ids"),
    "bad_words": (complete(bad_words=["a"] * (LIMITS.bad_words + 1)), 400, "bad_words"),
    "bad_word_chars": (complete(bad_words=["a" * (LIMITS.bad_word_chars + 1)]), 400, "bad_words[0]"),
    "priority": (complete(priority=LIMITS.priority + 1), 400, "priority"),
    "identifier_chars": (complete(cache_salt="x" * (LIMITS.identifier_chars + 1)), 400, "cache_salt"),
    "metadata_entries": (
        ("/v2/models/fake-model/generate", {"text_input": "Hi"} | {str(i): 1 for i in range(LIMITS.metadata_entries)}),
        400, ""),
    "template_kwargs": (
        chat(chat_template_kwargs={str(i): 1 for i in range(LIMITS.template_kwargs + 1)}), 400, "chat_template_kwargs"),
    "model_name_chars": (complete(model="x" * (LIMITS.model_name_chars + 1)), 400, "model"),
    "embed_inputs": ((EMBEDDINGS, {"input": ["a"] * (LIMITS.embed_inputs + 1)}), 400, "input"),
    "detokenize_tokens": (("/detokenize", {"tokens": [1] * (LIMITS.detokenize_tokens + 1)}), 413, ""),
    "error_message_chars": (complete(model="m" * LIMITS.model_name_chars), 404, "model"),
    "characters_per_token": (complete(prompt="x" * (LIMITS.characters_per_token * 128 + 1)), 400, "prompt"),
    "json_depth": (complete(user=nested(LIMITS.json_depth)), 400, ""),
}  # fmt: skip


def test_every_limit_has_its_breach() -> None:
    assert {field.name for field in dataclasses.fields(Limits)} == {*BREACHES, *HELD_ELSEWHERE}


@pytest.mark.parametrize("name", BREACHES)
async def test_a_breach_is_refused_and_named(name: str) -> None:
    (path, body), status, param = BREACHES[name]
    engine = FakeEngine(task="embed" if path == EMBEDDINGS else "generate", max_model_len=128)
    settings = ServeSettings(model="fake", served_model_names=("fake-model",), tool_call_parser="hermes")
    replica = Replica(settings, engine, lambda path: ByteTokenizer())
    await replica.start()

    found, _, answer = await asgi_call(build_app(replica), "POST", path, json.dumps(body).encode())

    error = json.loads(answer)["error"]
    assert found == status
    assert len(answer) < 2 * LIMITS.error_message_chars
    if param:
        assert error["param"] == param
    assert not engine.received


async def test_stored_files_and_open_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = dataclasses.replace(LIMITS, stored_files=2, open_batches=1, batch_lines=3)
    monkeypatch.setattr("octavo_server.batches.service.LIMITS", bounds)
    settings = ServeSettings(model="fake", batch_folder=str(tmp_path))
    replica = Replica(settings, FakeEngine(step_s=0.2), lambda path: ByteTokenizer())
    await replica.start()
    app = build_app(replica)
    line = json.dumps({"custom_id": "ID", "url": COMPLETIONS, "body": {"prompt": "x", "max_tokens": 3}})
    content = "\n".join(line.replace("ID", str(i)) for i in range(4)).encode()

    async def upload(data: bytes) -> tuple[int, dict[str, Any]]:
        form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        form += b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + data + b"\r\n--b--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=b"}
        status, _, answer = await asgi_call(app, "POST", "/v1/files", form, headers)
        return status, json.loads(answer)

    async def start(file_id: str) -> tuple[int, dict[str, Any]]:
        body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        status, _, answer = await asgi_call(app, "POST", "/v1/batches", json.dumps(body).encode())
        return status, json.loads(answer)

    _, too_long = await upload(content)
    _, good = await upload(content.splitlines()[0])
    assert (await upload(b"x"))[0] == 400
    _, first = await start(good["id"])
    status, refused = await start(good["id"])
    assert (status, refused["error"]["type"]) == (429, "RateLimitError")
    assert replica.batches is not None
    api = replica.batches.api
    await eventually(lambda: api.batch("", first["id"])["status"] == "completed", 10)
    _, second = await start(too_long["id"])
    await eventually(lambda: api.batch("", second["id"])["status"] == "failed", 10)
    assert api.batch("", second["id"])["errors"]["data"][0]["code"] == "too_many_lines"
    await replica.close(1.0)
