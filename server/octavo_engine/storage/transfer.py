"""Several files at once, with one progress for all."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from octavo_engine.storage.cache import require_free_space
from octavo_engine.storage.http import HttpClient, RemoteFile
from octavo_engine.storage.progress import ByteProgress, OnProgress

MAX_CONNECTIONS = 4


def download_all(
    client: HttpClient, files: Sequence[RemoteFile], folder: Path, shown_as: str, on_progress: OnProgress
) -> None:
    """Download `files` into `folder`, a few at a time; raises the first failure after the others have stopped."""
    total = sum(file.num_bytes or 0 for file in files)
    have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_free_space(folder, max(total - have, 0))
    progress = ByteProgress(total, f"downloading {shown_as}", on_progress)
    on_progress(0.0, f"downloading {shown_as}")
    with ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="download") as pool:
        futures = [pool.submit(client.download, file, folder, progress.add) for file in files]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in done:
            future.result()
