"""Several processes of a gateway that start at once on a folder nobody has used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo_batches.store import BatchStore, StoreLimits
from octavo_gateway.usage.sqlite import SqliteStore

NUM_AT_ONCE = 8
NUM_FOLDERS = 20


def open_ledger(folder: Path) -> None:
    store = SqliteStore(folder / "usage.sqlite")
    with store.transaction() as cursor:
        cursor.execute("SELECT count(*) FROM usage")
    store.close()


def open_batches(folder: Path) -> None:
    BatchStore(folder, StoreLimits(1, 1, 1)).close()


@pytest.mark.parametrize("opened", [open_ledger, open_batches])
def test_a_new_database_is_opened_by_all_who_come_at_once(tmp_path: Path, opened: Callable[[Path], None]) -> None:
    failures: list[Exception] = []

    def come(folder: Path, together: threading.Barrier) -> None:
        together.wait()
        try:
            opened(folder)
        except Exception as error:
            failures.append(error)

    for number in range(NUM_FOLDERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        together = threading.Barrier(NUM_AT_ONCE)
        threads = [threading.Thread(target=come, args=(folder, together)) for _ in range(NUM_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
