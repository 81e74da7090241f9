"""No request makes the server open a connection or read a file, and a model's folder runs no code of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from fakes.asgi_client import asgi_call
from fakes.byte_tokenizer import ByteTokenizer
from fakes.fake_engine import FakeEngine
from models.tiny_checkpoints import SIZES, load, write_checkpoint, write_tokenizer
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_server.app import build_app
from octavo_server.openai.request_types import ChatCompletionRequest
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings

SECRET = "secret-of-the-file"


def addresses(port: int, file: Path) -> list[str]:
    """One place, written in many ways."""
    host = f"127.0.0.1:{port}"
    return [
        f"http://{host}/x", f"https://{host}/x.png", f"HTTP://{host}", f"//{host}/x", f"http:\\\\{host}\\x",
        f"http://user:pw@{host}/", f"http://localhost:{port}/", f"http://[::1]:{port}/", f"http://[::ffff:127.0.0.1]:{port}",
        f"http://2130706433:{port}/", f"http://0x7f000001:{port}/", f"http://127.1:{port}/", f"http://0:{port}/",
        f"http://example.com@{host}/", f"http://{host}#@example.com/", f"http://example.com\\@{host}/",
        "http://169.254.169.254/latest/meta-data/", f"ftp://{host}/x", f"gopher://{host}/_x", f"file://{file}",
        f"file:{file}", str(file), f"file://localhost{file}", f"![x](http://{host}/x.png)", f"<img src='http://{host}/'>",
        f"data:text/html,<script src='http://{host}'>", f"hf://{host}/x", f"s3://{host}/x", f"unix:{file}",
        f"http:{host}/x", f"http:/{host}/x", f"http:///{host}/x", f" http://{host}/x", f"\thttp://{host}/x", f"ht\ntp://{host}",
        f"http://{host}\x00.example.com/", f"http://017700000001:{port}/", f"http://0177.0.0.1:{port}/", f"http://127.0.1:{port}",
        f"http://0x7f.1:{port}/", f"http://127.0.0.1.nip.io:{port}/", f"http://localtest.me:{port}/", f"http://①②⑦.⓪.⓪.①:{port}/",
        f"http://127。0。0。1:{port}/", f"http://[::]:{port}/", f"http://[0:0:0:0:0:ffff:7f00:1]:{port}/", f"http://LOCALHOST.:{port}/",
        f"http://a:b@c:d@{host}/", f"http://{host}?@example.com", f"http://example.com#{host}", f"http://{host}%2f..%2fx",
        f"http://[fe80::1%25lo]:{port}/", "http://metadata.google.internal/computeMetadata/v1/", "http://100.100.100.200/latest",
        f"ws://{host}/", f"dict://{host}/x", f"ldap://{host}/x", f"jar:http://{host}!/x", f"view-source:http://{host}/",
        f"FILE://{file}", f"file:///{host}/../..{file}",
    ]  # fmt: skip


def test_there_are_sixty_addresses(tmp_path: Path) -> None:
    assert len(set(addresses(1, tmp_path))) >= 60


def bodies(address: str) -> list[dict[str, Any]]:
    """The address wherever a request could hide it."""
    user = {"role": "user", "content": "Hi"}
    parts = [
        {"type": "image_url", "image_url": {"url": address}}, {"type": "image_url", "image_url": address},
        {"type": "input_image", "image_url": address}, {"type": "video_url", "video_url": {"url": address}},
        {"type": "input_audio", "input_audio": {"data": address}}, {"type": "file", "file": {"file_data": address}},
        {"type": "text", "text": address},
    ]  # fmt: skip
    found = [{"messages": [{"role": "user", "content": [part]}]} for part in parts]
    found += [{"messages": [{"role": "user", "content": address}]}]
    for name in sorted(ChatCompletionRequest.__struct_fields__):
        found.append({"messages": [user], name: address})
        found.append({"messages": [user], name: {"url": address, "$ref": address}})
    found.append({"messages": [user], "guided_json": {"$ref": address, "$schema": address, "$id": address}})
    found.append({"messages": [user], "tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "$ref": address}}}], "tool_choice": "required"})  # fmt: skip
    return found


async def test_no_address_in_a_request_is_ever_opened(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    visits: list[Any] = []
    listener = await asyncio.start_server(lambda reader, writer: visits.append(reader), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    replica = Replica(ServeSettings(model="fake"), FakeEngine(), lambda path: ByteTokenizer())
    await replica.start()
    app = build_app(replica)

    for address in addresses(port, file):
        for body in bodies(address):
            status, _, answer = await asgi_call(app, "POST", "/v1/chat/completions", json.dumps(body).encode())
            assert status < 500
            assert SECRET.encode() not in answer

    await asyncio.sleep(0.05)
    listener.close()
    assert visits == []


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines", "trust_remote_code"])
def test_code_in_a_model_folder_never_runs(tmp_path: Path, key: str) -> None:
    canary = tmp_path / "executed"
    folder = tmp_path / "model"
    write_checkpoint(folder, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    write_tokenizer(folder)
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Evil: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code)
    evil = {name: f"{file}.Evil" for name, file in (
        ("AutoConfig", "configuration_evil"), ("AutoModelForCausalLM", "modeling_evil"),
        ("AutoTokenizer", "tokenization_evil"),
    )}  # fmt: skip
    value: Any = True if key == "trust_remote_code" else evil
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        existing = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**existing, key: value, "tokenizer_class": "Evil"}))

    with contextlib.suppress(Exception):
        load(folder)
    with contextlib.suppress(Exception):
        load_tokenizer(folder)

    assert not canary.exists()
