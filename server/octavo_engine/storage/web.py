"""`https://`: one GGUF file, or a safetensors checkpoint named by its index or its single file.

A `#sha256=HEX` fragment pins the content of a single file; plain `http://` is accepted only with one.
OCTAVO_STORAGE_TOKEN is sent as a bearer token, over https only.
"""

from __future__ import annotations

import os
import posixpath
import re
import urllib.parse
from pathlib import Path

import msgspec

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.cache import ModelCache
from octavo_engine.storage.http import HttpClient, RemoteError, RemoteFile
from octavo_engine.storage.progress import OnProgress
from octavo_engine.storage.safe_path import relative_name
from octavo_engine.storage.transfer import download_all
from octavo_engine.storage.uri import StorageURI

INDEX_SUFFIX = ".safetensors.index.json"
REQUIRED_BESIDE_WEIGHTS = ("config.json", "tokenizer.json")
OPTIONAL_BESIDE_WEIGHTS = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
NOT_THERE = (403, 404, 410)


class SafetensorsIndex(msgspec.Struct, frozen=True):
    """The part of `model.safetensors.index.json` that names files."""

    weight_map: dict[str, str]


def fetch(uri: StorageURI, cache: ModelCache, on_progress: OnProgress, client: HttpClient | None = None) -> Path:
    """The cached model behind a web address; raises `ModelLoadError`."""
    parts = urllib.parse.urlsplit(uri.text)
    sha256 = _pinned_digest(uri, parts.fragment)
    name = posixpath.basename(urllib.parse.unquote(parts.path))
    if not parts.hostname or not name:
        raise ModelLoadError(f"model {uri.public_text!r}: the address must name a host and a file")
    relative_name(name)
    if uri.scheme == "http" and sha256 is None:
        raise ModelLoadError(
            f"model {uri.public_text!r}: plain http can be tampered with; use https, or pin the file with #sha256=HEX"
        )
    token = os.environ.get("OCTAVO_STORAGE_TOKEN", "").strip() if uri.scheme == "https" else ""
    client = client or HttpClient({"Authorization": f"Bearer {token}"} if token else None)
    url = urllib.parse.urlunsplit(parts._replace(fragment=""))

    def fill(folder: Path) -> str:
        if name.lower().endswith(".gguf"):
            file = RemoteFile(url, name, num_bytes=client.size(url), sha256=sha256)
            download_all(client, [file], folder, name, on_progress)
            return name
        if name.endswith(INDEX_SUFFIX):
            index = client.read(url)
            shards = _shards(index, uri)
            (folder / name).write_bytes(index)
        elif name.endswith(".safetensors"):
            shards = [name]
        else:
            raise ModelLoadError(
                f"model {uri.public_text!r}: the address must end in .gguf, .safetensors or {INDEX_SUFFIX}"
            )
        _download_checkpoint(client, url, shards, sha256, folder, on_progress)
        return "."

    return cache.obtain(url + (f"#sha256={sha256}" if sha256 else ""), uri.public_text, fill, on_progress)


def _pinned_digest(uri: StorageURI, fragment: str) -> str | None:
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise ModelLoadError(f"model {uri.public_text!r}: the fragment must be #sha256= and 64 hexadecimal digits")
    return match[1].lower()


def _shards(index: bytes, uri: StorageURI) -> list[str]:
    try:
        names = sorted(set(msgspec.json.decode(index, type=SafetensorsIndex).weight_map.values()))
    except msgspec.DecodeError as error:
        raise ModelLoadError(f"model {uri.public_text!r}: not a safetensors index ({error})") from error
    for name in names:
        relative_name(name)
        if not name.endswith(".safetensors"):
            raise ModelLoadError(f"model {uri.public_text!r}: the index names {name!r}, which is no safetensors file")
    return names


def _download_checkpoint(
    client: HttpClient, url: str, shards: list[str], sha256: str | None, folder: Path, on_progress: OnProgress
) -> None:
    files = []
    for name in (*REQUIRED_BESIDE_WEIGHTS, *OPTIONAL_BESIDE_WEIGHTS, *shards):
        address = urllib.parse.urljoin(url, urllib.parse.quote(name))
        try:
            size = client.size(address)
        except RemoteError as error:
            if name in OPTIONAL_BESIDE_WEIGHTS and error.status in NOT_THERE:
                continue
            raise
        files.append(RemoteFile(address, name, num_bytes=size, sha256=sha256 if shards == [name] else None))
    download_all(client, files, folder, posixpath.basename(url), on_progress)
