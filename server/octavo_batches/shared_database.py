"""An SQLite file that several processes read and write."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Literal

_RETRY_S = 0.01


def open_shared_database(path: Path, timeout_s: float, synchronous: Literal["NORMAL", "FULL"]) -> sqlite3.Connection:
    """Opened with a write-ahead log, without implicit transactions, usable from any thread.

    Calls wait up to `timeout_s` for other processes, this one too. Raises sqlite3.Error.
    """
    database = sqlite3.connect(path, check_same_thread=False, timeout=timeout_s, isolation_level=None)
    try:
        _use_write_ahead_log(database, time.monotonic() + timeout_s)
        database.execute(f"PRAGMA synchronous={synchronous}")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _use_write_ahead_log(database: sqlite3.Connection, deadline: float) -> None:
    """SQLite does not wait here by itself: of two that open a new file at once, one would be told that it is locked."""
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return
