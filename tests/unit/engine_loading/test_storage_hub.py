"""hf:// against a hub that speaks the Hugging Face API on a local port."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage import resolve

COMMIT = "a" * 40
REPO = "org/model"


@pytest.fixture
def hub(file_server, isolated: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", file_server.address)
    return file_server


def publish(hub, files: dict[str, bytes], *, revision: str = "main", commit: str = COMMIT, broken: str = "") -> None:
    """Put a repository on the hub; the digest listed for `broken` is wrong."""
    siblings = []
    for name, body in files.items():
        large = name.endswith((".safetensors", ".gguf", ".bin"))
        sha256 = hashlib.sha256(body if name != broken else b"other").hexdigest()
        blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
        entry = {"rfilename": name, "size": len(body), "blobId": blob}
        siblings.append(entry | ({"lfs": {"sha256": sha256, "size": len(body), "pointerSize": 1}} if large else {}))
        hub.files[f"/{REPO}/resolve/{commit}/{quote(name)}"] = body
    answer = {"id": REPO, "sha": commit, "siblings": siblings, "private": False}
    hub.files[f"/api/models/{REPO}/revision/{quote(revision, safe='')}?blobs=true"] = json.dumps(answer).encode()


CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"w1" * 1_000,
    "model-00002-of-00002.safetensors": b"w2" * 1_000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": b"\x80pickle",
    "modeling_custom.py": b"import os",
    "consolidated.safetensors": b"again",
    "onnx/model.onnx": b"x",
    "original/params.json": b"{}",
}


def test_a_checkpoint_comes_without_pickles_and_code(hub) -> None:
    publish(hub, CHECKPOINT)
    folder = resolve(f"hf://{REPO}")
    names = {path.name for path in folder.iterdir() if not path.name.startswith((".", "octavo-cache"))}
    assert names == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"w2" * 1_000


def test_a_cached_model_needs_no_hub(hub) -> None:
    publish(hub, CHECKPOINT)
    first = resolve(f"hf://{REPO}")
    asked = len(hub.requests)
    hub.failures = {path: [429] * 99 for path in hub.files}
    assert resolve(f"hf://{REPO}") == first
    assert len(hub.requests) == asked


def test_eight_replicas_that_start_at_once_fetch_each_file_once(hub) -> None:
    publish(hub, CHECKPOINT)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: resolve(f"hf://{REPO}"), range(8)))
    assert len(folders) == 1
    assert {hub.count(path) for path, _ in hub.requests} == {1}


def test_an_interrupted_download_fetches_only_what_is_missing(hub) -> None:
    publish(hub, CHECKPOINT)
    second = f"/{REPO}/resolve/{COMMIT}/model-00002-of-00002.safetensors"
    hub.failures[second] = [403]
    with pytest.raises(ModelLoadError):
        resolve(f"hf://{REPO}")
    resolve(f"hf://{REPO}")
    assert hub.count(f"/{REPO}/resolve/{COMMIT}/model-00001-of-00002.safetensors") == 1
    assert hub.count(second) == 2


def test_a_single_gguf_file_can_be_named(hub) -> None:
    publish(hub, {"a.Q4_0.gguf": b"GGUF a", "sub/b.gguf": b"GGUF b"})
    assert resolve(f"hf://{REPO}/sub/b.gguf").read_bytes() == b"GGUF b"
    assert hub.count(f"/{REPO}/resolve/{COMMIT}/a.Q4_0.gguf") == 0


def test_several_gguf_files_ask_for_a_choice(hub) -> None:
    publish(hub, {"a.gguf": b"a", "b.gguf": b"b"})
    with pytest.raises(ModelLoadError, match=r"name one as hf://org/model/FILE: a\.gguf, b\.gguf"):
        resolve(f"hf://{REPO}")


def test_a_file_that_is_not_there_lists_those_that_are(hub) -> None:
    publish(hub, {"a.gguf": b"a"})
    with pytest.raises(ModelLoadError, match=r"GGUF files: a\.gguf"):
        resolve(f"hf://{REPO}/b.gguf")


def test_weights_only_in_pickles_are_refused(hub) -> None:
    publish(hub, {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    with pytest.raises(ModelLoadError, match="convert them to safetensors"):
        resolve(f"hf://{REPO}")
    assert hub.count(f"/{REPO}/resolve/{COMMIT}/pytorch_model.bin") == 0


@pytest.mark.parametrize(
    ("uri", "revision"),
    [(f"hf://{REPO}@v1", None), (f"hf://{REPO}", "v1")],
)
def test_a_revision_is_honoured(hub, uri: str, revision: str | None) -> None:
    publish(hub, {"m.gguf": b"one"}, revision="v1")
    assert resolve(uri, revision=revision).read_bytes() == b"one"


def test_a_branch_with_a_slash_comes_as_revision(hub) -> None:
    publish(hub, {"m.gguf": b"pr"}, revision="refs/pr/1")
    assert resolve(f"hf://{REPO}", revision="refs/pr/1").read_bytes() == b"pr"


def test_a_file_that_was_tampered_with_is_refused(hub) -> None:
    publish(hub, {"m.gguf": b"evil"}, broken="m.gguf")
    with pytest.raises(ModelLoadError, match="SHA-256"):
        resolve(f"hf://{REPO}")


def test_files_of_two_commits_are_never_mixed(hub) -> None:
    old, new = dict(CHECKPOINT), {name: body + b"new" for name, body in CHECKPOINT.items()}
    publish(hub, old)
    hub.failures[f"/{REPO}/resolve/{COMMIT}/tokenizer.json"] = [404]
    with pytest.raises(ModelLoadError):
        resolve(f"hf://{REPO}")
    publish(hub, new, commit="b" * 40)
    folder = resolve(f"hf://{REPO}")
    assert (folder / "config.json").read_bytes() == b"{}new"
    assert (folder / "model-00001-of-00002.safetensors").read_bytes().endswith(b"new")


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "set HF_TOKEN"),
        (403, "set HF_TOKEN"),
        (404, "no such repository"),
        (429, "limits requests"),
        (500, "try again later"),
    ],
)
def test_refusals_say_what_to_do(hub, status: int, advice: str) -> None:
    hub.failures[f"/api/models/{REPO}/revision/main?blobs=true"] = [status] * 99
    with pytest.raises(ModelLoadError, match=advice):
        resolve(f"hf://{REPO}")


def test_a_token_opens_gated_models(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, {"m.gguf": b"gated"})
    hub.token = "right"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelLoadError, match="token was not accepted") as caught:
        resolve(f"hf://{REPO}")
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert resolve(f"hf://{REPO}").read_bytes() == b"gated"


def test_the_token_file_of_the_hub_tools_is_read(hub, isolated: Path) -> None:
    publish(hub, {"m.gguf": b"gated"})
    hub.token = "from-file"
    (isolated / "hf").mkdir()
    (isolated / "hf" / "token").write_text("from-file\n")
    assert resolve(f"hf://{REPO}").read_bytes() == b"gated"


def test_offline_mode_never_calls_out(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, {"m.gguf": b"x"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE"):
        resolve(f"hf://{REPO}")
    assert hub.requests == []


def test_a_snapshot_of_the_hub_tools_is_used_in_place(hub, isolated: Path) -> None:
    repo = isolated / "hf" / "hub" / "models--org--model"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_bytes(b"{}")
    assert resolve(f"hf://{REPO}") == snapshot
    assert hub.requests == []


def test_an_incomplete_snapshot_of_the_hub_tools_is_not_used(hub, isolated: Path) -> None:
    snapshot = isolated / "hf" / "hub" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(b"{}")
    publish(hub, {"m.gguf": b"x"}, revision=COMMIT)
    assert resolve(f"hf://{REPO}@{COMMIT}").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["../evil.safetensors", "/abs.safetensors", "a\\..\\b.safetensors"])
def test_a_hub_cannot_write_outside_the_cache(hub, isolated: Path, name: str) -> None:
    publish(hub, {"config.json": b"{}", name: b"evil"})
    with pytest.raises(ModelLoadError):
        resolve(f"hf://{REPO}")
    assert not list(isolated.rglob("evil*"))


@pytest.mark.parametrize(
    "uri", ["hf://org", "hf://org/", "hf:///x/y", "hf://org/m@../x", "hf://org/m/x.bin", "hf://a b/c"]
)
def test_impossible_addresses_are_refused(hub, uri: str) -> None:
    with pytest.raises(ModelLoadError):
        resolve(uri)
    assert hub.requests == []


def test_something_that_is_no_hub_is_recognised(hub) -> None:
    hub.files[f"/api/models/{REPO}/revision/main?blobs=true"] = b"<html>login</html>"
    with pytest.raises(ModelLoadError, match="does not answer like a model hub"):
        resolve(f"hf://{REPO}")
