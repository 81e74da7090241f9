"""The model cache fills an entry once, whoever asks and whatever breaks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.cache import ModelCache, default_cache_dir, os_errors_explained, require_free_space
from octavo_engine.storage.progress import ByteProgress, ignore_progress

URI = "test://model"


def _fill(folder: Path) -> str:
    (folder / "m.gguf").write_bytes(b"weights")
    return "m.gguf"


def _must_not_fill(folder: Path) -> str:
    raise AssertionError("filled again")


def test_a_finished_entry_is_not_filled_again(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    first = cache.obtain(URI, URI, _fill, ignore_progress)
    assert first.read_bytes() == b"weights"
    assert cache.obtain(URI, URI, _must_not_fill, ignore_progress) == first


def test_uris_with_the_same_readable_name_do_not_share_an_entry(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    assert cache.entry_folder("a://x?1", "same") != cache.entry_folder("a://x?2", "same")


def test_no_uri_escapes_the_cache_folder(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    for name in ("../../x", "/etc/passwd", "a\x00b", "." * 300, "\u202e", ""):
        entry = cache.entry_folder(name, name)
        assert entry.parent == tmp_path / "models"
        assert len(entry.name.encode()) < 120


def test_a_damaged_entry_is_filled_anew(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    model = cache.obtain(URI, URI, _fill, ignore_progress)
    model.write_bytes(b"cut")
    assert cache.obtain(URI, URI, _fill, ignore_progress).read_bytes() == b"weights"


def test_an_interrupted_fill_leaves_no_entry_but_its_files(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> str:
        (folder / "m.gguf.part").write_bytes(b"half")
        raise ModelLoadError("the network went away")

    def resumed(folder: Path) -> str:
        assert (folder / "m.gguf.part").read_bytes() == b"half"
        (folder / "m.gguf.part").rename(folder / "m.gguf")
        return "m.gguf"

    cache = ModelCache(tmp_path)
    with pytest.raises(ModelLoadError, match="network went away"):
        cache.obtain(URI, URI, interrupted, ignore_progress)
    assert cache.obtain(URI, URI, resumed, ignore_progress).read_bytes() == b"half"


def test_a_read_only_cache_serves_what_it_has(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    model = cache.obtain(URI, URI, _fill, ignore_progress)
    (tmp_path / "models" / (model.parent.name + ".lock")).unlink()
    (tmp_path / "models").chmod(0o555)
    try:
        assert cache.obtain(URI, URI, _must_not_fill, ignore_progress) == model
    finally:
        (tmp_path / "models").chmod(0o755)


def _obtain_in_process(root: Path, log: Path) -> None:
    def slow_fill(folder: Path) -> str:
        with log.open("a") as file:
            file.write("filled\n")
        time.sleep(0.2)
        return _fill(folder)

    ModelCache(root).obtain(URI, URI, slow_fill, ignore_progress)


def test_processes_that_ask_at_once_fill_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=_obtain_in_process, args=(tmp_path / "cache", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert log.read_text() == "filled\n"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "larger disk"),
        (errno.EACCES, "this user may write"),
        (errno.EROFS, "this user may write"),
        (errno.ENOLCK, "no file locks"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_errors_of_the_file_system_say_what_to_do(tmp_path: Path, code: int, advice: str) -> None:
    with pytest.raises(ModelLoadError, match=advice), os_errors_explained(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path))


def test_a_download_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"needs .* TiB but"):
        require_free_space(tmp_path, 1 << 60)


def test_the_cache_folder_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("OCTAVO_CACHE_DIR")
    assert default_cache_dir() == Path.home() / ".cache" / "octavo"


def test_progress_rises_to_one_and_is_not_chatty() -> None:
    told: list[float] = []
    progress = ByteProgress(10_000, "x", lambda fraction, _: told.append(fraction))
    for _ in range(10_000):
        progress.add(1)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) <= 202


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("OCTAVO_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ModelLoadError, match="set OCTAVO_CACHE_DIR"):
        default_cache_dir()
