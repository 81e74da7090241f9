"""One join for every name that comes from a URI, a hub or an archive."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from octavo_engine.errors import ModelLoadError

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 1_024


def relative_name(name: str) -> PurePosixPath:
    """Check an untrusted relative file name; raises `ModelLoadError` for anything that could leave its folder."""
    parts = name.split("/")
    plain = (
        name.isprintable()
        and "\\" not in name
        and ":" not in parts[0]
        and len(name.encode()) <= MAX_PATH_BYTES
        and all(part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in parts)
    )
    if not plain:
        raise ModelLoadError(
            f"file name {name!r} is refused: it must be a relative path without '..', backslashes or control characters"
        )
    return PurePosixPath(name)


def safe_join(folder: Path, name: str) -> Path:
    """`folder/name` for an untrusted `name`; raises `ModelLoadError` when it would lie outside, also by a symlink."""
    target = folder.joinpath(relative_name(name))
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ModelLoadError(f"file name {name!r} is refused: it leads out of {folder}")
    return target
