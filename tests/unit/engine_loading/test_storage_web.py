"""Models behind plain web addresses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage import resolve
from octavo_engine.storage.cache import ModelCache
from octavo_engine.storage.http import HttpClient
from octavo_engine.storage.progress import ignore_progress
from octavo_engine.storage.uri import StorageURI
from octavo_engine.storage.web import fetch


def _fetch(address: str, root: Path) -> Path:
    """As https would, without its certificate."""
    uri = StorageURI(address, "https", address.partition("://")[2])
    return fetch(uri, ModelCache(root), ignore_progress, HttpClient(timeout_s=5, sleep=lambda _: None))


def test_a_gguf_file_is_downloaded_once(file_server, tmp_path: Path) -> None:
    file_server.files["/m.gguf"] = b"GGUF" * 100
    first = _fetch(f"{file_server.address}/m.gguf", tmp_path)
    asked = len(file_server.requests)
    assert first.read_bytes() == b"GGUF" * 100
    assert _fetch(f"{file_server.address}/m.gguf", tmp_path) == first
    assert len(file_server.requests) == asked


def test_a_pinned_digest_is_checked(file_server, tmp_path: Path) -> None:
    file_server.files["/m.gguf"] = b"GGUF"
    digest = hashlib.sha256(b"GGUF").hexdigest()
    assert _fetch(f"{file_server.address}/m.gguf#sha256={digest}", tmp_path).read_bytes() == b"GGUF"
    with pytest.raises(ModelLoadError, match="SHA-256"):
        _fetch(f"{file_server.address}/m.gguf#sha256={'0' * 64}", tmp_path)


def test_an_index_brings_its_shards_and_neighbours(file_server, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    file_server.files = {
        "/x/model.safetensors.index.json": json.dumps(index).encode(),
        "/x/m-1.safetensors": b"1",
        "/x/m-2.safetensors": b"2",
        "/x/config.json": b"{}",
        "/x/tokenizer.json": b"{}",
    }
    folder = _fetch(f"{file_server.address}/x/model.safetensors.index.json", tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors.index.json",
        "m-1.safetensors",
        "m-2.safetensors",
        "config.json",
        "tokenizer.json",
        "octavo-cache.json",
    }


@pytest.mark.parametrize("name", ["../../etc/x.safetensors", "/x.safetensors", "model.bin"])
def test_an_index_cannot_name_what_it_likes(file_server, tmp_path: Path, name: str) -> None:
    file_server.files["/model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    with pytest.raises(ModelLoadError):
        _fetch(f"{file_server.address}/model.safetensors.index.json", tmp_path)


def test_a_missing_required_neighbour_is_named(file_server, tmp_path: Path) -> None:
    file_server.files["/model.safetensors"] = b"1"
    with pytest.raises(ModelLoadError, match=r"config\.json: the server answered 404"):
        _fetch(f"{file_server.address}/model.safetensors", tmp_path)


def test_plain_http_needs_a_pinned_digest() -> None:
    with pytest.raises(ModelLoadError, match="pin the file with #sha256"):
        resolve("http://host/m.gguf")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://host/m.gguf#sha256=xyz", "64 hexadecimal"),
        ("https://host/", "host and a file"),
        ("https:///m.gguf", "host and a file"),
        ("https://host/..%2f..%2fx.gguf", "host and a file|is refused|cannot be reached"),
    ],
)
def test_impossible_addresses_are_refused(uri: str, message: str, isolated: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        resolve(uri)
