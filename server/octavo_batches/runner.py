"""Runs batches in the background, each request once, behind everyone who waits for an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from octavo_batches.errors import BatchError
from octavo_batches.input import Line, read_input, read_line
from octavo_batches.lines import BatchFileError, BatchRequest, finished_ids, result
from octavo_batches.records import BatchRecord, BatchStatus, LineError, LineErrors
from octavo_batches.store import BatchStore

CONCURRENCY = 16  # requests of one batch at a time
PRIORITY = 1_000_000  # later than anything a caller waits for
FAILED_TRIES = 5
_BUSY = frozenset({429, 503})
_SAVE_INTERVAL_S = 1.0
_MAX_WAIT_S = 30.0

logger = logging.getLogger("octavo.batches")


class Answer(NamedTuple):
    """What a request was answered. `retry_after_s` as the answer's header said."""

    status: int
    body: bytes
    request_id: str = ""
    retry_after_s: float | None = None


_NO_ANSWER = Answer(0, b"the answer was cut short")


class Ask(Protocol):
    """Sends one request of a batch where every request goes, at the lowest priority.

    `on_answer` is called as soon as the answer is whole, before anything else learns that the request is over: so what
    is counted for it is never without its line in the results.
    """

    def __call__(
        self, record: BatchRecord, request: BatchRequest, on_answer: Callable[[Answer], None]
    ) -> Awaitable[None]: ...


class PausedError(Exception):
    """No more work is taken; the batch goes on in the next process."""


class BatchRunner:
    """One task for each open batch; used from one event loop, in one process of all that share the store.

    Answers 429 and 503 are waited out; those of `unsure` (a replica that died) are tried again a few times. `ask`
    raises `PausedError` where no more work is taken.
    """

    def __init__(
        self,
        store: BatchStore,
        ask: Ask,
        *,
        unsure: frozenset[int] = frozenset(),
        max_running: int | None = None,
        max_running_of_tenant: int | None = None,
    ) -> None:
        self._store = store
        self._ask = ask
        self._unsure = unsure
        self._max_running = max_running
        self._max_running_of_tenant = max_running_of_tenant
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: Counter[str] = Counter()  # by tenant

    def resume(self) -> None:
        """Take up what is open and does not run here, the oldest first, as far as bounds allow."""
        for record in self._store.open_batches():
            if self._max_running is not None and len(self._tasks) >= self._max_running:
                return
            of_tenant = self._running[record.tenant]
            if self._max_running_of_tenant is not None and of_tenant >= self._max_running_of_tenant:
                continue
            if record.id not in self._tasks:
                self.start(record)

    def start(self, record: BatchRecord) -> None:
        """Run a batch to its end, from wherever it stands."""
        task = asyncio.get_running_loop().create_task(self._run(record))
        self._tasks[record.id] = task
        self._running[record.tenant] += 1

        def on_end(ended: asyncio.Task[None]) -> None:
            del self._tasks[record.id]
            self._running[record.tenant] -= 1
            if not ended.cancelled() and ended.exception() is not None:
                logger.error("batch %s stands still: %r", record.id, ended.exception())

        task.add_done_callback(on_end)

    async def close(self) -> None:
        """Leave every batch as it is."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, record: BatchRecord) -> None:
        try:
            lines = await self._validated(record)
            if lines is None:
                return
            if record.status == "validating":
                self._move(record, "in_progress")
            with contextlib.suppress(PausedError):
                await self._answer(record, lines)
                await self._finalize(record)
        except (OSError, BatchFileError) as error:
            logger.error("batch %s cannot go on: %s", record.id, error)
            self._fail(record, [LineError("storage", "the results could not be kept; the server's log says why")])

    async def _validated(self, record: BatchRecord) -> list[Line] | None:
        """Where every request of the input is, or None once the batch has failed for its lines."""
        try:
            path = self._store.content_path(self._store.file(record.tenant, record.input_file_id))
        except BatchError as error:
            self._fail(record, [LineError("input_file", error.message)])
            return None
        lines, errors = await asyncio.to_thread(read_input, path, record.endpoint, self._store.limits.lines)
        if errors:
            self._fail(record, errors)
            return None
        record.request_counts.total = len(lines)
        return lines

    async def _answer(self, record: BatchRecord, lines: list[Line]) -> None:
        """Answer whatever has no result yet; each result is on disk before the next request begins in its place."""
        results = self._store.results_path(record)
        done = await asyncio.to_thread(finished_ids, results)
        counts = record.request_counts
        counts.completed, counts.failed = await asyncio.to_thread(_count, results)
        pending = iter([line for line in lines if line.custom_id not in done])
        content = self._store.content_path(self._store.file(record.tenant, record.input_file_id))
        paused = False
        with content.open("rb") as source, results.open("ab") as sink:
            progress = _Progress(record, self._store, sink)

            async def work() -> None:
                nonlocal paused
                for line in pending:
                    if paused or self._is_over(record):
                        return
                    try:
                        await self._ask_until_answered(record, read_line(source, line), progress)
                    except PausedError:
                        paused = True  # what is under way is finished

            await _all(work() for _ in range(CONCURRENCY))
        if paused:
            raise PausedError

    async def _ask_until_answered(self, record: BatchRecord, request: BatchRequest, progress: _Progress) -> None:
        """A full line is waited for, and so is a limit."""
        wait_s, failures = 0.5, 0
        last, kept = _NO_ANSWER, False
        broken: Exception | None = None

        def on_answer(answer: Answer) -> None:
            nonlocal last, kept, broken
            last = answer
            unsure = answer.status in self._unsure and failures + 1 < FAILED_TRIES
            if answer.status in _BUSY or unsure:
                return
            try:
                progress.keep(request, answer)
                kept = True
            except Exception as error:  # which is the batch's, and not of the application that answers
                broken = error

        while True:
            last = _NO_ANSWER
            await self._ask(record, request, on_answer)
            if broken is not None:
                raise broken
            if kept:
                return
            if _is_cancelled():  # an application that takes it for a client's leaving does not raise it again
                raise asyncio.CancelledError
            failures += last.status not in _BUSY
            if failures >= FAILED_TRIES:
                progress.keep(request, last)
                return
            if self._is_over(record):
                progress.keep(request, Answer(0, b"the batch ended before this request could run"))
                return
            await asyncio.sleep(min(_MAX_WAIT_S, wait_s if last.retry_after_s is None else last.retry_after_s))
            wait_s = min(_MAX_WAIT_S, 2 * wait_s)

    def _is_over(self, record: BatchRecord) -> bool:
        if record.status != "cancelling" and self._store.is_cancelled(record):
            self._move(record, "cancelling")
        return record.status == "cancelling" or time.time() > record.expires_at

    async def _finalize(self, record: BatchRecord) -> None:
        cancelled = record.status == "cancelling"
        if not cancelled:
            self._move(record, "finalizing")
        await asyncio.to_thread(self._store_results, record)
        counts = record.request_counts
        expired = counts.completed + counts.failed < counts.total
        self._move(record, "cancelled" if cancelled else "expired" if expired else "completed")
        self._store.results_path(record).unlink(missing_ok=True)

    def _store_results(self, record: BatchRecord) -> None:
        """Two files of the tenant's: lines that succeeded, and those that failed. Doing it again changes nothing."""
        with tempfile.TemporaryFile() as succeeded, tempfile.TemporaryFile() as failed:
            for line in _results(self._store.results_path(record)):
                (failed if _failed(line) else succeeded).write(line)
            for name, lines in (("output", succeeded), ("error", failed)):
                if lines.tell():
                    lines.seek(0)
                    file_id = f"file-{record.id.removeprefix('batch_')}-{name}"
                    filename = f"{record.id}_{name}.jsonl"
                    file = self._store.add_file(record.tenant, filename, "batch_output", lines, file_id)
                    setattr(record, f"{name}_file_id", file.id)

    def _fail(self, record: BatchRecord, errors: list[LineError]) -> None:
        record.errors = LineErrors(errors)
        self._move(record, "failed")

    def _move(self, record: BatchRecord, status: BatchStatus) -> None:
        record.status = status
        if getattr(record, f"{status}_at") is None:
            setattr(record, f"{status}_at", int(time.time()))
        self._store.save(record)
        logger.info("batch %s: %s", record.id, status)


class _Progress:
    """The results of one batch while it runs, and its counts, which are written once a second."""

    def __init__(self, record: BatchRecord, store: BatchStore, sink: BinaryIO) -> None:
        self._record = record
        self._store = store
        self._sink = sink
        self._saved_at = time.monotonic()

    def keep(self, request: BatchRequest, answer: Answer) -> None:
        """Write the line that answers a request."""
        line = result(request, answer.status, answer.body.decode(errors="replace"), answer.request_id)
        self._sink.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._sink.flush()
        self._record.request_counts.failed += line["error"] is not None
        self._record.request_counts.completed += line["error"] is None
        if time.monotonic() - self._saved_at > _SAVE_INTERVAL_S:
            self._saved_at = time.monotonic()
            self._store.save(self._record)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _all(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Run until all have ended; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _results(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as lines:
            yield from lines


def _failed(line: bytes) -> bool:
    return json.loads(line)["error"] is not None


def _count(path: Path) -> tuple[int, int]:
    """(completed, failed) of the results so far."""
    failed = [_failed(line) for line in _results(path)]
    return failed.count(False), failed.count(True)
