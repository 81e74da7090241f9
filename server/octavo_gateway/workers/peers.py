"""How workers of one gateway ask each other: a word over a Unix socket, answered with bytes.

Whoever is asked for metrics or state, asks the others and answers for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from octavo_gateway.workers.seat import Seat

log = logging.getLogger("octavo.gateway.workers")

ASK_TIMEOUT_S = 1.0
KEEP_EVERY_S = 2.0
MAX_WORD_BYTES = 64
METRICS = "metrics"

Answers = Mapping[str, Callable[[], bytes]]


class Peers:
    """One worker's line to the others. `answers` says what it tells by which word."""

    def __init__(self, seat: Seat, answers: Answers) -> None:
        self._seat = seat
        self._answers = answers
        self._server: asyncio.Server | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Be there for the others."""
        path = _socket(self._seat.folder, self._seat.index)
        path.unlink(missing_ok=True)  # of this seat's dead predecessor
        self._server = await asyncio.start_unix_server(self._serve, path)
        self._keeping = asyncio.create_task(self._keep_metrics())

    async def ask(self, word: str) -> list[bytes]:
        """What every worker that is there answers, this one included."""
        others = (index for index in range(self._seat.count) if index != self._seat.index)
        answers = await asyncio.gather(*(self._ask_one(index, word) for index in others))
        return [self._answers[word](), *(answer for answer in answers if answer is not None)]

    def last_words(self) -> list[bytes]:
        """The last metrics of workers that are gone, whose counts must not be forgotten."""
        alive = {_pid(path) for path in self._seat.folder.glob("worker-*.pid")}
        pages = []
        for path in self._seat.folder.glob("worker-*.metrics"):
            if path.stem.split("-")[1] not in alive:
                with contextlib.suppress(OSError):
                    pages.append(path.read_bytes())
        return pages

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self._keep()
        if self._server is not None:
            self._server.close()

    async def _keep_metrics(self) -> None:
        while True:
            self._keep()
            await asyncio.sleep(KEEP_EVERY_S)

    def _keep(self) -> None:
        """For the day this worker is gone without a word."""
        folder, own = self._seat.folder, os.getpid()
        new = folder / f"worker-{own}.new"
        with contextlib.suppress(OSError):
            new.write_bytes(self._answers[METRICS]())
            new.rename(metrics_file(folder, own))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            word = (await reader.readline())[:MAX_WORD_BYTES].strip().decode("ascii", "replace")
            if word in self._answers:
                writer.write(self._answers[word]())
                await writer.drain()
        writer.close()

    async def _ask_one(self, index: int, word: str) -> bytes | None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(_socket(self._seat.folder, index))
                try:
                    writer.write(word.encode() + b"\n")
                    return await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            log.warning("worker %d did not answer; its %s are missing", index, word)
            return None


def pid_file(folder: Path, index: int) -> Path:
    """Where the parent writes which process sits at `index`."""
    return folder / f"worker-{index}.pid"


def metrics_file(folder: Path, pid: int) -> Path:
    """Where a worker keeps its metrics; its age tells whether the worker still does anything."""
    return folder / f"worker-{pid}.metrics"


def _pid(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii")
    return ""


def _socket(folder: Path, index: int) -> Path:
    return folder / f"worker-{index}.sock"
