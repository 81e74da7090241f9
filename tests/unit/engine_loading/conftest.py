"""A local file server with the moods of real ones, and an isolated model cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from octavo_engine.storage import http


@dataclass
class FileServer:
    """Serves `files` by path. `failures[path]` are statuses answered first; `cut[path]` ends a body early, once;
    `cut_all` ends every body after so many bytes."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    cut_all: int | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)

    def count(self, path: str) -> int:
        return sum(1 for asked, _ in self.requests if asked == path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def do_GET(self) -> None:
        state, path = self.state, self.path
        state.requests.append((path, self.headers.get("Range")))
        state.authorizations.append(self.headers.get("Authorization"))
        if state.failures.get(path):
            self._answer(state.failures[path].pop(0), b"")
        elif path in state.redirects:
            self._answer(302, b"", {"Location": state.redirects[path]})
        elif state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            self._answer(401, b"")
        elif path not in state.files:
            self._answer(404, b"")
        else:
            self._send_file(state.files[path])

    def _send_file(self, body: bytes) -> None:
        asked = self.headers.get("Range")
        etag = f'"{hash(body)}"'
        valid = self.headers.get("If-Range", etag) == etag
        if asked and self.state.ranges and valid:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(body):
                self._answer(416, b"")
                return
            content_range = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", "ETag": etag}
            self._answer(206, body[start:], content_range)
        else:
            self._answer(200, body, {"ETag": etag})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.state.cut.pop(self.path, self.state.cut_all) if status < 300 else None
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """A server on a free local port."""
    state = FileServer()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache, home and hub settings of nobody else; retries wait no time."""
    for name in (
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN_PATH",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "MAX_WAIT_S", 0.0)
    return tmp_path
