"""Adapters of a real model through the whole replica: named, mixed, loaded, unloaded, counted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
import torch

from models.lora_adapters import write_adapter
from models.smollm2_reference import load_reference

PROMPT = "The capital of France is"
MODULES = ["q_proj", "v_proj", "down_proj"]
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def adapters(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """(folder with the adapters red and blue, the models with them merged in)."""
    folder = tmp_path_factory.mktemp("adapters")
    base = load_reference(smollm2_gguf)
    merged = {"smollm2": base}
    for seed, name in enumerate(("red", "blue")):
        merged[name] = write_adapter(base, folder / name, seed, target_modules=MODULES, r=8)
    return folder, merged


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, adapters: tuple[Path, dict[str, torch.nn.Module]]) -> Iterator[str]:
    """Address of a replica that starts with the adapter red and may load more."""
    folder = adapters[0]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "octavo_cli.main", "serve", str(smollm2_gguf), "--served-model-name", "smollm2",
            "--port", "0", "--device", "cpu", "--dtype", "float32", "--max-model-len", "512", "--num-kv-blocks", "128",
            "--drain-propagation", "0", "--num-threads", "1", "--enable-lora", "--max-loras", "2",
            "--max-lora-rank", "16", "--lora-modules", f"red={folder / 'red'}", "--lora-root", str(folder),
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    url = None
    while url is None:
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
        found = re.search(r"listening on (http://\S+)", lines[-1])
        url = found[1] if found else None
    threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
    deadline = time.monotonic() + 180
    while httpx2.get(f"{url}/health/ready").status_code != 200:
        assert process.poll() is None, "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.2)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, "".join(lines)
    assert "Traceback" not in "".join(lines)


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, model: str) -> list[int]:
    """Greedy tokens."""
    choice = client.completions.create(
        model=model,
        prompt=PROMPT,
        temperature=0,
        max_tokens=NUM_TOKENS,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]
    return list(choice.model_extra["token_ids"])  # type: ignore[index]


def reference(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def prompt_ids(server: str) -> list[int]:
    return list(httpx2.post(f"{server}/tokenize", json={"prompt": PROMPT}).json()["tokens"])


def manage(server: str, action: str, **body: object) -> httpx2.Response:
    return httpx2.post(f"{server}/v1/{action}_lora_adapter", json=body, timeout=60)


def test_adapters_are_models_of_their_own(
    server: str, client: openai.OpenAI, adapters: tuple[Path, dict[str, torch.nn.Module]]
) -> None:
    assert manage(server, "load", lora_name="blue", lora_path="blue").status_code == 200
    models = {model.id: model.model_extra or {} for model in client.models.list()}
    assert {name: extra["parent"] for name, extra in models.items()} == {
        "smollm2": None,
        "red": "smollm2",
        "blue": "smollm2",
    }

    names = ["red", "blue", "smollm2"] * 3
    with ThreadPoolExecutor(len(names)) as pool:  # one batch of all three
        answers = list(pool.map(lambda name: complete(client, name), names))

    prompt = prompt_ids(server)
    wanted = {name: reference(model, prompt) for name, model in adapters[1].items()}
    assert dict(zip(names, answers, strict=True)) == wanted
    assert all(answer == wanted[name] for name, answer in zip(names, answers, strict=True))
    assert wanted["red"] != wanted["smollm2"] != wanted["blue"]
    answer = client.chat.completions.create(model="red", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    assert answer.model == "red"
    metrics = httpx2.get(f"{server}/metrics").text
    assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""}' in metrics
    assert 'octavo_lora_requests{adapter="red",resident="true",state="running"} 0.0' in metrics


def test_the_v2_protocol_knows_them_too(server: str, client: openai.OpenAI) -> None:
    body = {"text_input": PROMPT, "sampling_parameters": '{"temperature": 0, "max_tokens": 8, "ignore_eos": true}'}
    answer = httpx2.post(f"{server}/v2/models/red/generate", json=body).json()
    text = client.completions.create(
        model="red", prompt=PROMPT, temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer["model_name"] == "red"
    assert answer["text_output"].endswith(text.choices[0].text)
    index = httpx2.post(f"{server}/v2/repository/index").json()
    assert "red" in {row["name"] for row in index}


def test_unloading_ends_the_name_and_not_the_answer_under_way(server: str, client: openai.OpenAI) -> None:
    assert manage(server, "load", lora_name="brief", lora_path="red").status_code == 200
    stream = client.completions.create(
        model="brief", prompt=PROMPT, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(manage, server, "unload", lora_name="brief")
        last = None
        for chunk in stream:
            last = chunk
        assert unloading.result().status_code == 200
    assert last is not None
    assert last.choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        complete(client, "brief")


@pytest.mark.parametrize(
    ("action", "body", "status", "complaint"),
    [
        ("load", {"lora_name": "x", "lora_path": "/etc"}, 400, "lora_path"),
        ("load", {"lora_name": "x", "lora_path": "../.."}, 400, "lora_path"),
        ("load", {"lora_name": "smollm2", "lora_path": "red"}, 400, "lora_name"),
        ("load", {"lora_name": "red", "lora_path": "red"}, 400, "loaded already"),
        ("load", {"lora_name": "", "lora_path": "red"}, 400, "lora_name"),
        ("load", {"lora_path": "red"}, 400, "lora_name"),
        ("unload", {"lora_name": "nobody"}, 404, "nobody"),
    ],
    ids=str,
)
def test_wrong_requests_name_their_field(
    server: str, action: str, body: dict[str, object], status: int, complaint: str
) -> None:
    answer = manage(server, action, **body)
    assert answer.status_code == status
    assert complaint in answer.json()["error"]["message"]
