"""One HTTP client for model files: proxies, retries, resumed downloads, checked digests."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.safe_path import safe_join

CHUNK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20
MAX_ATTEMPTS = 5
MAX_WAIT_S = 60.0
PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
USER_AGENT = "octavo"


class RemoteError(ModelLoadError):
    """A server refused or failed; `status` is its HTTP status, or 0 when it could not be reached."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to download: `name` is its place in the model folder; length and digests are checked when known."""

    url: str
    name: str
    num_bytes: int | None = None
    sha256: str | None = None
    git_blob_sha1: str | None = None


class HttpClient:
    """Blocking GETs through the environment's proxies. `headers` (say, a token) never follow a redirect elsewhere."""

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._headers = {"User-Agent": USER_AGENT} | dict(headers or {})
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._opener = _opener()

    def read(self, url: str) -> bytes:
        """A small document; raises `RemoteError`."""
        for attempt in range(MAX_ATTEMPTS):
            with self._retrying(url, attempt), self._open(url, {}) as response:
                body: bytes = response.read(MAX_DOCUMENT_BYTES + 1)
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise RemoteError(f"{public_url(url)}: the answer is larger than {MAX_DOCUMENT_BYTES} bytes", 200)
                return body
        raise AssertionError("the last attempt returns or raises")

    def size(self, url: str) -> int | None:
        """The length a server announces for a file, or None; raises `RemoteError`."""
        for attempt in range(MAX_ATTEMPTS):
            with self._retrying(url, attempt), self._open(url, {}) as response:
                return _content_length(response)
        raise AssertionError("the last attempt returns or raises")

    def download(self, file: RemoteFile, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        """Fetch one file into `folder`, going on where an earlier attempt stopped; raises `RemoteError`.

        `on_bytes` gets every count of new bytes, negative when the server makes us start over.
        """
        target = safe_join(folder, file.name)
        if target.exists():
            on_bytes(target.stat().st_size)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        on_bytes(_size(part))
        attempt = 0
        while True:
            before = _size(part)
            with self._retrying(file.url, attempt):
                self._continue(file, part, on_bytes)
                break
            attempt = attempt + 1 if _size(part) <= before else 1  # a slow but moving download may break many times
        _verify(file, part)
        part.rename(target)
        _validator_path(part).unlink(missing_ok=True)
        return target

    def _continue(self, file: RemoteFile, part: Path, on_bytes: Callable[[int], None]) -> None:
        """Ask for what is missing and append it."""
        have = _size(part)
        validator_path = _validator_path(part)
        validator = validator_path.read_text() if validator_path.exists() else ""
        if have and not validator and file.sha256 is None and file.git_blob_sha1 is None:
            have = _start_over(part, have, on_bytes)  # nothing could tell whether the rest belongs to these bytes
        if have and have == file.num_bytes:
            return
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and validator:
            headers["If-Range"] = validator
        try:
            response = self._open(file.url, headers)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
            _start_over(part, have, on_bytes)
            response = self._open(file.url, {})
        with response:
            resumed = response.status == http.client.PARTIAL_CONTENT and _range_start(response) == have
            if have and not resumed:
                _start_over(part, have, on_bytes)
            if response.status == http.client.PARTIAL_CONTENT and not resumed:
                raise ConnectionError("the server answered with another range than asked for")
            etag = response.headers.get("ETag", "")
            if etag.startswith('"'):
                validator_path.write_text(etag)
            _append(response, part, on_bytes)

    def _open(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        if not url.startswith(("http://", "https://")):
            raise RemoteError(f"{public_url(url)}: only http and https addresses can be fetched", 0)
        request = urllib.request.Request(url)  # noqa: S310 - checked above
        for name, value in {**self._headers, **headers}.items():
            if name == "Authorization":
                request.add_unredirected_header(name, value)
            else:
                request.add_header(name, value)
        response: http.client.HTTPResponse = self._opener.open(request, timeout=self._timeout_s)
        return response

    @contextmanager
    def _retrying(self, url: str, attempt: int) -> Iterator[None]:
        """Sleep after a passing failure, unless it was the last attempt; raise `RemoteError` for a lasting one."""
        last = attempt == MAX_ATTEMPTS - 1
        try:
            yield
        except urllib.error.HTTPError as error:
            error.close()
            if last or error.code not in PASSING_STATUSES:
                raise RemoteError(
                    f"{public_url(url)}: the server answered {error.code} {error.reason}", error.code
                ) from error
            self._sleep(_wait_s(attempt, error.headers))
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error
            if last or isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError):
                raise RemoteError(
                    f"{public_url(url)}: cannot be reached ({reason}); check the network, proxies and certificates "
                    "(HTTPS_PROXY, SSL_CERT_FILE)",
                    0,
                ) from error
            self._sleep(_wait_s(attempt, None))


def public_url(url: str) -> str:
    """A URL without user info, query and fragment, which may hold secrets."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        target = urllib.parse.urlsplit(newurl).scheme
        if target not in ("http", "https") or (req.type == "https" and target == "http"):
            raise RemoteError(
                f"{public_url(req.full_url)}: refused to follow a redirect to a {target}:// address", code
            )
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None and _origin(req.full_url) == _origin(newurl):
            for name, value in req.unredirected_hdrs.items():
                redirected.add_unredirected_header(name, value)
        return redirected


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_tls_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        _SafeRedirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _tls_context() -> ssl.SSLContext:
    """The system's authorities, plus those named the way requests, curl and pip are told of a company's own."""
    context = ssl.create_default_context()
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"):
        path = os.environ.get(variable)
        if path and Path(path).is_file():
            context.load_verify_locations(cafile=path)
    return context


def _wait_s(attempt: int, headers: Message | None) -> float:
    asked = headers.get("Retry-After", "") if headers is not None else ""
    wait_s = float(asked) if asked.isdigit() else 0.5 * 2.0**attempt
    return min(wait_s, MAX_WAIT_S)


def _content_length(response: http.client.HTTPResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _range_start(response: http.client.HTTPResponse) -> int | None:
    text = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(text) if text.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _start_over(part: Path, have: int, on_bytes: Callable[[int], None]) -> int:
    part.unlink(missing_ok=True)
    _validator_path(part).unlink(missing_ok=True)
    on_bytes(-have)
    return 0


def _append(response: http.client.HTTPResponse, part: Path, on_bytes: Callable[[int], None]) -> None:
    expected = _content_length(response)
    received = 0
    with part.open("ab") as file:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            received += len(chunk)
            on_bytes(len(chunk))
    if expected is not None and received < expected:
        raise ConnectionError(f"the connection ended after {received} of {expected} bytes")


def _verify(file: RemoteFile, part: Path) -> None:
    """Check length and digest; a wrong file is removed, so that the next attempt does not build on it."""
    size = part.stat().st_size
    problem = None
    if file.num_bytes is not None and size != file.num_bytes:
        problem = f"has {size} bytes, expected {file.num_bytes}"
    elif file.sha256 is not None and _digest(part, hashlib.sha256) != file.sha256.lower():
        problem = f"does not match its SHA-256 digest {file.sha256}"
    elif file.git_blob_sha1 is not None:
        header = f"blob {size}\0".encode()
        if _digest(part, lambda: hashlib.sha1(header, usedforsecurity=False)) != file.git_blob_sha1.lower():
            problem = f"does not match its Git object id {file.git_blob_sha1}"
    if problem is not None:
        part.unlink()
        _validator_path(part).unlink(missing_ok=True)
        raise RemoteError(f"{public_url(file.url)}: the downloaded file {problem}; it was removed, try again", 200)


def _digest(path: Path, start: Callable[[], hashlib._Hash]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, start).hexdigest()
