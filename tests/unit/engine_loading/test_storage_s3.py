"""s3:// against a store that speaks enough of S3, on a local port, through the real client library."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage import resolve

pytest.importorskip("minio")


@dataclass
class Store:
    """Objects of one bucket. `denied` refuses everything; `queries` are those of downloads."""

    address: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    denied: bool = False
    queries: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(parts.path).lstrip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(parts.query))
        if self.store.denied:
            self._error(403, "AccessDenied")
        elif bucket != "models":
            self._error(404, "NoSuchBucket")
        elif "list-type" in query:
            self._list(query.get("prefix", ""))
        elif key not in self.store.objects:
            self._error(404, "NoSuchKey")
        else:
            if self.command == "GET":
                self.store.queries.append(parts.query)
            self._answer(200, self.store.objects[key])

    def _list(self, prefix: str) -> None:
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size><ETag>x</ETag>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key, body in sorted(self.store.objects.items())
            if key.startswith(prefix)
        )
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        page = f'<?xml version="1.0"?><ListBucketResult xmlns="{space}"><Name>models</Name><Prefix/>{rows}'
        self._answer(200, (page + "<IsTruncated>false</IsTruncated></ListBucketResult>").encode(), "application/xml")

    def _error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message><Resource>/</Resource></Error>".encode()
        self._answer(status, body, "application/xml")

    def _answer(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    state = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": state}))
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", state.address)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    yield state
    server.shutdown()
    server.server_close()


CHECKPOINT = {
    "llama/config.json": b"{}",
    "llama/tokenizer.json": b"{ }",
    "llama/model.safetensors": b"weights" * 100,
    "llama/pytorch_model.bin": b"pickle",
    "llama/code.py": b"import os",
    "other/model.safetensors": b"not ours",
}


def test_a_checkpoint_comes_without_pickles_and_code(store: Store) -> None:
    store.objects = dict(CHECKPOINT)
    folder = resolve("s3://models/llama/")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "octavo-cache.json"}
    assert files == {
        "config.json": b"{}",
        "tokenizer.json": b"{ }",
        "model.safetensors": b"weights" * 100,
    }


def test_downloads_are_signed_and_made_once(store: Store) -> None:
    store.objects = {"a/m.gguf": b"GGUF"}
    first = resolve("s3://models/a/m.gguf")
    assert first.read_bytes() == b"GGUF"
    assert resolve("s3://models/a/m.gguf") == first
    assert len(store.queries) == 1
    assert "X-Amz-Signature=" in store.queries[0]
    assert "hush" not in store.queries[0]


def test_a_public_bucket_needs_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch, isolated: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(isolated / "none"))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/nobody")
    store.objects = {"m.gguf": b"GGUF"}
    assert resolve("s3://models/m.gguf").read_bytes() == b"GGUF"
    assert store.queries == [""]


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("s3://models/nothing.gguf", "no such bucket or object"),
        ("s3://elsewhere/llama", "no such bucket or object"),
        ("s3://models/empty", "neither|holds no safetensors"),
        ("s3://", "expected s3://BUCKET"),
    ],
)
def test_what_is_missing_is_named(store: Store, uri: str, advice: str) -> None:
    with pytest.raises(ModelLoadError, match=advice):
        resolve(uri)


def test_a_refusal_says_what_to_check(store: Store) -> None:
    store.denied = True
    with pytest.raises(ModelLoadError, match="access is denied") as caught:
        resolve("s3://models/llama")
    assert "hush" not in str(caught.value)


def test_a_store_that_is_not_there_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "ftp://nowhere")
    with pytest.raises(ModelLoadError, match="must be an http or https address"):
        resolve("s3://models/llama")


@pytest.mark.parametrize("name", ["llama/../evil.safetensors", "llama/a\\b.safetensors"])
def test_a_store_cannot_write_outside_the_cache(store: Store, isolated: Path, name: str) -> None:
    store.objects = {"llama/config.json": b"{}", name: b"evil"}
    with pytest.raises(ModelLoadError):
        resolve("s3://models/llama")
    assert not list(isolated.rglob("evil*"))
