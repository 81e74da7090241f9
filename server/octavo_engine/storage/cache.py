"""The local model cache: one folder per URI, filled once, shared by every replica on the machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage.progress import OnProgress, format_bytes
from octavo_engine.storage.safe_path import safe_join

MANIFEST = "octavo-cache.json"
Fill = Callable[[Path], str]
"""Fills a folder (which may hold an interrupted attempt) and returns the model's name in it, or `.` for the folder."""


class Manifest(msgspec.Struct, frozen=True):
    """What a finished cache entry holds; written last, so its presence means the entry is whole."""

    uri: str
    model: str
    file_bytes: dict[str, int]


class ModelCache:
    """Cache entries under `root/models`. Reading one needs no lock, no network and no write access."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_cache_dir()

    def obtain(self, uri: str, public_name: str, fill: Fill, on_progress: OnProgress) -> Path:
        """The cached model of `uri`, filled by `fill` first when absent or damaged.

        Of several processes that ask at once, one fills and the others wait. `public_name` names the folder for
        humans. Raises `ModelLoadError`, also when the cache folder cannot be written.
        """
        entry = self.entry_folder(uri, public_name)
        if (model := _finished_model(entry)) is not None:
            return model
        with os_errors_explained(self.root), _locked(entry, on_progress):
            if (model := _finished_model(entry)) is not None:
                return model
            partial = entry.with_name(entry.name + ".partial")
            partial.mkdir(parents=True, exist_ok=True)
            try:
                model_name = fill(partial)
            except BaseException:
                _remove_if_empty(partial)  # what was received stays for the next attempt
                raise
            _publish(partial, entry, uri=public_name, model=model_name)
        model = _finished_model(entry)
        if model is None:
            raise ModelLoadError(f"model cache {entry}: the entry vanished while it was written; try again")
        return model

    def entry_folder(self, uri: str, public_name: str) -> Path:
        """Where a URI's files lie: a readable name made unique by the digest of the whole URI."""
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", public_name).strip("-.")[:80]
        digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
        return self.root / "models" / f"{readable}-{digest}"


def default_cache_dir() -> Path:
    """`OCTAVO_CACHE_DIR`, else `~/.cache/octavo`."""
    configured = os.environ.get("OCTAVO_CACHE_DIR")
    return Path(configured).expanduser() if configured else home_folder() / ".cache" / "octavo"


def home_folder() -> Path:
    """The user's home; raises `ModelLoadError` where there is none, as for the made-up users of containers."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise ModelLoadError(
            "model cache: this user has no home folder; set OCTAVO_CACHE_DIR (and HF_HOME for hf://) to writable ones"
        ) from error


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise `ModelLoadError` when `num_bytes` more do not fit on the folder's file system."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ModelLoadError(
            f"the download needs {format_bytes(num_bytes)} but {folder} has {format_bytes(free)} free; "
            "free some space or set OCTAVO_CACHE_DIR to a larger disk"
        )


@contextmanager
def os_errors_explained(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a `ModelLoadError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise ModelLoadError(f"model cache {folder}: {_advice(error, folder)}") from error


def _advice(error: OSError, folder: Path) -> str:
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{reason}; free some space there or set OCTAVO_CACHE_DIR to a larger disk"
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOTDIR | errno.EEXIST:
            return f"{reason} ({error.filename}); set OCTAVO_CACHE_DIR to a folder this user may write"
        case errno.ENOLCK | errno.ENOTSUP:
            return f"{reason}: its file system has no file locks; set OCTAVO_CACHE_DIR to one that has"
        case _:
            return f"{reason} ({error.filename})"


def _finished_model(entry: Path) -> Path | None:
    """The model of a whole entry; None when there is none or a file of it is missing or has another size."""
    try:
        manifest = msgspec.json.decode((entry / MANIFEST).read_bytes(), type=Manifest)
        if any(safe_join(entry, name).stat().st_size != size for name, size in manifest.file_bytes.items()):
            return None
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    return entry if manifest.model == "." else safe_join(entry, manifest.model)


def _publish(partial: Path, entry: Path, *, uri: str, model: str) -> None:
    files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    files.pop(MANIFEST, None)
    (partial / MANIFEST).write_bytes(msgspec.json.encode(Manifest(uri, model, files)))
    if entry.exists():
        shutil.rmtree(entry)
    partial.rename(entry)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _locked(entry: Path, on_progress: OnProgress) -> Iterator[None]:
    entry.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(entry.with_name(entry.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress(0.0, "waiting for another process that fetches the same model")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
