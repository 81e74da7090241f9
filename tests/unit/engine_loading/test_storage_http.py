"""Downloads resume, retry, check what they got, and keep secrets to the host they are for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.http import MAX_ATTEMPTS, HttpClient, RemoteError, RemoteFile

BODY = bytes(range(256)) * 4_000


def _client(**headers: str) -> HttpClient:
    return HttpClient(headers, timeout_s=5, sleep=lambda _: None)


def _file(server, **facts) -> RemoteFile:
    return RemoteFile(f"{server.address}/f", "f", **facts)


def test_a_file_arrives_whole_and_progress_adds_up(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = BODY
    counts: list[int] = []
    path = _client().download(_file(file_server, num_bytes=len(BODY)), tmp_path, counts.append)
    assert path.read_bytes() == BODY
    assert sum(counts) == len(BODY)
    assert list(tmp_path.iterdir()) == [path]


def test_a_connection_that_breaks_is_resumed_where_it_stopped(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = BODY
    file_server.cut["/f"] = 5_000
    counts: list[int] = []
    path = _client().download(_file(file_server), tmp_path, counts.append)
    assert path.read_bytes() == BODY
    assert file_server.requests == [("/f", None), ("/f", "bytes=5000-")]
    assert sum(counts) == len(BODY)


def test_a_download_that_keeps_moving_may_break_many_times(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = BODY
    file_server.cut_all = len(BODY) // 20
    assert _client().download(_file(file_server), tmp_path, lambda _: None).read_bytes() == BODY
    assert file_server.count("/f") > 2 * MAX_ATTEMPTS


def test_a_download_that_never_moves_ends(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = BODY
    file_server.cut_all = 0
    with pytest.raises(RemoteError, match="cannot be reached"):
        _client().download(_file(file_server), tmp_path, lambda _: None)
    assert file_server.count("/f") == MAX_ATTEMPTS


def test_a_server_without_ranges_makes_us_start_over(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = BODY
    file_server.ranges = False
    file_server.cut["/f"] = 5_000
    counts: list[int] = []
    assert _client().download(_file(file_server), tmp_path, counts.append).read_bytes() == BODY
    assert sum(counts) == len(BODY)


def test_bytes_of_an_older_version_are_not_continued(file_server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"older")
    (tmp_path / "f.part.etag").write_text('"of the older version"')
    file_server.files["/f"] = BODY
    assert _client().download(_file(file_server), tmp_path, lambda _: None).read_bytes() == BODY


def test_bytes_of_unknown_origin_are_not_continued(file_server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"whose?")
    file_server.files["/f"] = BODY
    assert _client().download(_file(file_server), tmp_path, lambda _: None).read_bytes() == BODY
    assert file_server.requests == [("/f", None)]


def test_a_range_beyond_the_end_starts_over(file_server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(BODY + b"more")
    file_server.files["/f"] = BODY
    file = _file(file_server, sha256=hashlib.sha256(BODY).hexdigest())
    assert _client().download(file, tmp_path, lambda _: None).read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(file_server, tmp_path: Path, status: int) -> None:
    file_server.files["/f"] = BODY
    file_server.failures["/f"] = [status] * (MAX_ATTEMPTS - 1)
    assert _client().download(_file(file_server), tmp_path, lambda _: None).read_bytes() == BODY


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (403, 1), (404, 1), (503, MAX_ATTEMPTS)])
def test_lasting_failures_are_reported_with_their_status(file_server, tmp_path: Path, status: int, tries: int) -> None:
    file_server.failures["/f"] = [status] * 100
    with pytest.raises(RemoteError, match=str(status)) as caught:
        _client().download(_file(file_server), tmp_path, lambda _: None)
    assert caught.value.status == status
    assert file_server.count("/f") == tries


def test_retry_after_is_waited_for() -> None:
    from email.message import Message

    from octavo_engine.storage.http import _wait_s

    headers = Message()
    headers["Retry-After"] = "7"
    assert _wait_s(0, headers) == 7
    headers.replace_header("Retry-After", "86400")
    assert _wait_s(0, headers) == 60


@pytest.mark.parametrize(
    "facts",
    [
        {"sha256": "0" * 64},
        {"git_blob_sha1": "0" * 40},
        {"num_bytes": 3},
    ],
)
def test_a_file_that_is_not_what_was_promised_is_removed(file_server, tmp_path: Path, facts: dict) -> None:
    file_server.files["/f"] = BODY
    with pytest.raises(ModelLoadError, match="it was removed"):
        _client().download(_file(file_server, **facts), tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_git_object_ids_are_checked_as_git_makes_them(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = b"hello\n"
    file = _file(file_server, git_blob_sha1="ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object
    assert _client().download(file, tmp_path, lambda _: None).read_bytes() == b"hello\n"


def test_a_token_does_not_follow_a_redirect_to_another_host(file_server, tmp_path: Path) -> None:
    other = file_server.address.replace("127.0.0.1", "localhost")
    file_server.files["/there"] = BODY
    file_server.redirects["/f"] = f"{other}/there"
    _client(Authorization="Bearer secret").download(_file(file_server), tmp_path, lambda _: None)
    assert file_server.authorizations == ["Bearer secret", None]


def test_a_token_follows_a_redirect_on_the_same_host(file_server, tmp_path: Path) -> None:
    file_server.files["/renamed"] = BODY
    file_server.redirects["/f"] = "/renamed"
    _client(Authorization="Bearer secret").download(_file(file_server), tmp_path, lambda _: None)
    assert file_server.authorizations == ["Bearer secret", "Bearer secret"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/x", "gopher://host/x"])
def test_redirects_to_other_schemes_are_refused(file_server, tmp_path: Path, target: str) -> None:
    file_server.redirects["/f"] = target
    with pytest.raises(ModelLoadError, match=r"redirect|302"):
        _client().download(_file(file_server), tmp_path, lambda _: None)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "data:,x"])
def test_the_client_itself_knows_only_http(url: str) -> None:
    with pytest.raises(ModelLoadError):
        _client().read(url)


def test_an_unknown_host_fails_at_once_with_advice() -> None:
    with pytest.raises(RemoteError, match="HTTPS_PROXY") as caught:
        _client().read("http://no-such-host.invalid/x")
    assert caught.value.status == 0


def test_a_name_that_leaves_the_folder_is_refused(file_server, tmp_path: Path) -> None:
    file_server.files["/f"] = BODY
    with pytest.raises(ModelLoadError, match="is refused"):
        _client().download(RemoteFile(f"{file_server.address}/f", "../f"), tmp_path, lambda _: None)


def test_messages_hold_no_secrets_of_the_address(file_server) -> None:
    with pytest.raises(RemoteError) as caught:
        _client().read(f"{file_server.address}/missing?signature=hush")
    assert "hush" not in str(caught.value)
