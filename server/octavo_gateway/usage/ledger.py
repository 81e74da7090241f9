"""The usage ledger: a journal that survives the process, moved in batches into a database, each record exactly once.

A request's begin and end are appended to the journal in the event loop (a few microseconds, no database on the hot
path). A thread moves whole journal segments into the database in one transaction and drops them after the commit. While
the database is away the journal keeps everything, up to its bound. A begin without an end, left by an earlier process
or by a gateway that is gone, is handed to `take_unfinished`; what nobody takes ends as `interrupted`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from pathlib import Path

import msgspec

from octavo_gateway.usage.journal import Journal
from octavo_gateway.usage.postgres import PostgresStore
from octavo_gateway.usage.record import Begun, UsageRecord, interrupted
from octavo_gateway.usage.sqlite import SqliteStore
from octavo_gateway.usage.store import LedgerAwayError, LedgerError, UsageStore

log = logging.getLogger("octavo.gateway.usage")

FLUSH_S = 0.5
RETRY_S = 2.0
LOOK_FOR_UNFINISHED_S = 60.0
SILENT_S = 900.0
"""A gateway that a database has not heard of for this long is gone, and what it left open is another's to end."""

SPOOL_BYTES = 1024 * 1024 * 1024
DATABASE = "usage.sqlite"

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Begun | UsageRecord)


class Ledger:
    """One gateway process. Open it before serving, close it after the drain.

    `folder` holds the journal, and the database unless `url` names a PostgreSQL, or `database` another file (which
    several processes of one machine may share). Raises `LedgerError`; a PostgreSQL that is away is only waited for.
    """

    def __init__(
        self, folder: Path, url: str | None = None, *, database: Path | None = None, spool_bytes: int = SPOOL_BYTES
    ) -> None:
        self.location: Path | str = url if url is not None else database or folder / DATABASE
        location = self.location
        self._store: UsageStore = SqliteStore(location) if isinstance(location, Path) else PostgresStore(location)
        self._journal = Journal(folder, spool_bytes)
        self._run_id = uuid.uuid4().hex
        self._flushing = threading.Lock()
        self._stop = threading.Event()
        self._unfinished: dict[str, Begun] = {}
        self._handed_out: set[str] = set()
        self._looked_at = 0.0
        self._away = False
        self.failures = 0
        try:
            self.flush()
        except LedgerAwayError as error:
            if isinstance(self.location, Path):
                self._let_go()
                raise
            self._failed(error)
        except LedgerError:
            self._let_go()
            raise
        self._thread = threading.Thread(target=self._follow, name="usage-ledger", daemon=True)
        self._thread.start()

    @property
    def spool_bytes(self) -> int:
        """Bytes in the journal that the database does not have yet."""
        return self._journal.num_bytes

    @property
    def is_full(self) -> bool:
        """True when the journal is at its bound, so that no new request should begin."""
        return self._journal.is_full

    def write(self, line: Begun | UsageRecord) -> None:
        """Append to the journal; it is safe from the end of this process once this returns. Raises `OSError`."""
        self._journal.write(_ENCODER.encode(line))

    def flush(self) -> None:
        """Move everything written so far into the database. Raises `LedgerAwayError`; then nothing is lost."""
        with self._flushing:
            for segment in self._journal.full_segments:
                self._ingest(segment)
            self._journal.rotate()
            for segment in self._journal.full_segments:
                self._ingest(segment)
            self._look_for_unfinished()

    def take_unfinished(self) -> list[Begun]:
        """Requests of processes that ended without settling them; whoever takes them writes their records."""
        with self._flushing:
            taken, self._unfinished = list(self._unfinished.values()), {}
            return taken

    def make_room(self) -> None:
        """Tell a successor that this process is about to end, so that it takes another folder instead of failing."""
        self._journal.say_leaving()

    def close(self) -> None:
        """Move the rest and let go of the folder; with the database away, the next process goes on from the journal."""
        self._stop.set()
        self._thread.join()
        for begun in self.take_unfinished():
            self.write(interrupted(begun))
        try:
            self.flush()
        except LedgerError as error:
            log.error("usage ledger: %s; %d bytes stay in the journal", error, self.spool_bytes)
        self._let_go()

    def _follow(self) -> None:
        while not self._stop.wait(RETRY_S if self._away else FLUSH_S):
            try:
                self.flush()
            except (LedgerError, OSError) as error:
                self._failed(error)
            else:
                if self._away:
                    self._away = False
                    log.info("usage ledger: the database is back")

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if not self._away:
            self._away = True
            log.error("usage ledger: %s; records stay in the journal and are tried again", error)

    def _ingest(self, segment: Path) -> None:
        begun: dict[str, bytes] = {}
        ended: dict[str, UsageRecord] = {}
        for line in segment.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):  # a line cut by a crash while it was written
                record = _DECODER.decode(line)
                if isinstance(record, Begun):
                    begun[record.id] = line
                elif record.outcome != "interrupted" or record.id not in ended:
                    ended[record.id] = record
        still_open = [(id_, line) for id_, line in begun.items() if id_ not in ended]
        run = "" if self._journal.is_left_behind(segment) else self._run_id
        self._store.add(self._journal.source, run, still_open, list(ended.values()), time.time())
        self._journal.drop(segment)

    def _look_for_unfinished(self) -> None:
        now = time.time()
        if now - self._looked_at < LOOK_FOR_UNFINISHED_S:
            return
        lines = self._store.unfinished(self._journal.source, self._run_id, now, now - SILENT_S)
        self._looked_at = now
        found = [begun for line in lines if isinstance(begun := _DECODER.decode(line), Begun)]
        fresh = [begun for begun in found if begun.id not in self._handed_out]
        self._handed_out = {begun.id for begun in found}
        self._unfinished.update((begun.id, begun) for begun in fresh)
        if fresh:
            log.warning("usage ledger: %d requests were cut off by the end of a gateway", len(fresh))

    def _let_go(self) -> None:
        self._store.close()
        self._journal.close()
