"""Adapters of a real model through the whole replica: named, mixed, loaded, unloaded, counted."""

from __future__ import annotations

import itertools
import json
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
from safetensors.torch import save_file

PROMPT = "The capital of France is"
MODULES = ["q_proj", "v_proj", "down_proj"]
NUM_TOKENS = 8


WIDTHS = {"self_attn.q_proj": (576, 576), "self_attn.v_proj": (576, 192), "mlp.down_proj": (1536, 576)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters red and blue for SmolLM2, in PEFT's layout."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("red", "blue")):
        rng = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer, (module, (inputs, outputs)) in itertools.product(range(30), WIDTHS.items()):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, inputs, generator=rng) / inputs**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 8, generator=rng) / 8**0.5
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": MODULES}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, adapters: Path) -> Iterator[str]:
    """Address of a replica that starts with the adapter red and may load more."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "octavo_cli.main", "serve", str(smollm2_gguf), "--served-model-name", "smollm2",
            "--port", "0", "--device", "cpu", "--dtype", "float32", "--max-model-len", "512", "--num-kv-blocks", "128",
            "--drain-propagation", "0", "--num-threads", "1", "--enable-lora", "--max-loras", "2",
            "--max-lora-rank", "16", "--lora-modules", f"red={adapters / 'red'}", "--lora-root", str(adapters),
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


def manage(server: str, action: str, **body: object) -> httpx2.Response:
    return httpx2.post(f"{server}/v1/{action}_lora_adapter", json=body, timeout=60)


def test_adapters_are_models_of_their_own(server: str, client: openai.OpenAI) -> None:
    assert manage(server, "load", lora_name="blue", lora_path="blue").status_code == 200
    models = {model.id: model.model_extra or {} for model in client.models.list()}
    assert {name: extra["parent"] for name, extra in models.items()} == {
        "smollm2": None,
        "red": "smollm2",
        "blue": "smollm2",
    }

    alone = {name: complete(client, name) for name in ("red", "blue", "smollm2")}
    names = ["red", "blue", "smollm2"] * 3
    with ThreadPoolExecutor(len(names)) as pool:  # one batch of all three
        answers = list(pool.map(lambda name: complete(client, name), names))

    assert answers == [alone[name] for name in names]
    assert len({tuple(answer) for answer in alone.values()}) == 3
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
