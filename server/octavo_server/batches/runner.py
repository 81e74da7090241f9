"""Runs batches in the background, through the same routes as every request, behind everyone who waits for an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, TextIO

from octavo_server.batches.lines import BatchFileError, BatchRequest, finished_ids, read_request, result
from octavo_server.batches.store import BatchRecord, BatchStatus, BatchStore, LineError, LineErrors
from octavo_server.caller import PRIORITY_HEADER, TENANT_HEADER
from octavo_server.lifecycle import Lifecycle, Phase
from octavo_server.limits import LIMITS

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]
CONCURRENCY = 16  # requests of one batch at a time
PRIORITY = 1_000_000  # later than anything a caller waits for
_SAVE_INTERVAL_S = 1.0
_MAX_WAIT_S = 30.0
_SHOWN_ERRORS = 20

logger = logging.getLogger("octavo.server")


class _PausedError(Exception):
    """The replica stops taking work; the batch goes on in the next process."""


class BatchRunner:
    """One task for each open batch; used from one event loop."""

    def __init__(self, store: BatchStore, lifecycle: Lifecycle) -> None:
        self._store = store
        self._lifecycle = lifecycle
        self._app: App | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def bind(self, app: App) -> None:
        """Name the application that answers the requests."""
        self._app = app

    def resume(self) -> None:
        """Go on with what an earlier process left open."""
        for record in self._store.open_batches():
            self.start(record)

    def start(self, record: BatchRecord) -> None:
        """Run a batch to its end, from wherever it stands."""
        task = asyncio.get_running_loop().create_task(self._run(record))
        self._tasks[record.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(record.id, None))

    def cancel(self, record: BatchRecord) -> None:
        """Begin no further request of a batch; what it has is kept."""
        if record.status in ("validating", "in_progress"):
            self._move(record, "cancelling")

    async def close(self) -> None:
        """Leave every batch as it is."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, record: BatchRecord) -> None:
        try:
            requests = await self._validated(record)
            if requests is None:
                return
            if record.status == "validating":
                self._move(record, "in_progress")
            with contextlib.suppress(_PausedError):
                await self._answer(record, requests)
                await self._finalize(record)
        except (OSError, BatchFileError) as error:
            logger.error("batch %s cannot go on: %s", record.id, error)
            self._fail(record, [LineError("storage", "the results could not be kept; the server's log says why")])

    async def _validated(self, record: BatchRecord) -> list[BatchRequest] | None:
        """Every request of the input, or None once the batch has failed for its lines."""
        path = self._store.content_path(self._store.file(record.tenant, record.input_file_id))
        requests, errors = await asyncio.to_thread(_read_input, path, record.endpoint)
        if errors:
            self._fail(record, errors)
            return None
        record.request_counts.total = len(requests)
        return requests

    async def _answer(self, record: BatchRecord, requests: list[BatchRequest]) -> None:
        """Answer whatever has no result yet; each result is on disk before the next request begins in its place."""
        path = self._store.results_path(record)
        done = await asyncio.to_thread(finished_ids, path)
        counts = record.request_counts
        counts.completed, counts.failed = await asyncio.to_thread(_count, path)
        pending = iter([request for request in requests if request.custom_id not in done])
        saved_at = time.monotonic()
        with path.open("a", encoding="utf-8") as sink:

            async def worker() -> None:
                nonlocal saved_at
                for request in pending:
                    if record.status == "cancelling" or time.time() > record.expires_at:
                        return
                    self._keep(record, sink, await self._ask(record, request))
                    if time.monotonic() - saved_at > _SAVE_INTERVAL_S:
                        saved_at = time.monotonic()
                        self._store.save(record)

            workers = [asyncio.ensure_future(worker()) for _ in range(CONCURRENCY)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _keep(self, record: BatchRecord, sink: TextIO, line: dict[str, Any]) -> None:
        sink.write(json.dumps(line, ensure_ascii=False) + "\n")
        sink.flush()
        record.request_counts.failed += line["error"] is not None
        record.request_counts.completed += line["error"] is None

    async def _ask(self, record: BatchRecord, request: BatchRequest) -> dict[str, Any]:
        """The result of one request; a full queue is waited for."""
        headers = {"content-type": "application/json", PRIORITY_HEADER: str(PRIORITY)}
        if record.tenant:
            headers[TENANT_HEADER] = record.tenant
        wait_s = 0.5
        while True:
            if self._lifecycle.phase is not Phase.READY or self._app is None:
                raise _PausedError
            status, answered, body = await _post(self._app, request.url, json.dumps(request.body).encode(), headers)
            if status not in (429, 503):
                return result(request, status, body.decode(), answered.get("x-request-id", ""))
            if record.status == "cancelling" or time.time() > record.expires_at:
                return result(request, 0, "the batch ended before this request could run", "")
            await asyncio.sleep(min(_MAX_WAIT_S, float(answered.get("retry-after", wait_s))))
            wait_s = min(_MAX_WAIT_S, 2 * wait_s)

    async def _finalize(self, record: BatchRecord) -> None:
        cancelled = record.status == "cancelling"
        if not cancelled:
            self._move(record, "finalizing")
        good, bad = await asyncio.to_thread(_split, self._store.results_path(record))
        for name, content in (("output", good), ("error", bad)):
            if content:
                file = await asyncio.to_thread(
                    self._store.add_file, record.tenant, f"{record.id}_{name}.jsonl", "batch_output", content
                )
                setattr(record, f"{name}_file_id", file.id)
        counts = record.request_counts
        expired = counts.completed + counts.failed < counts.total
        self._move(record, "cancelled" if cancelled else "expired" if expired else "completed")
        self._store.results_path(record).unlink(missing_ok=True)

    def _fail(self, record: BatchRecord, errors: list[LineError]) -> None:
        record.errors = LineErrors(errors)
        self._move(record, "failed")

    def _move(self, record: BatchRecord, status: BatchStatus) -> None:
        record.status = status
        setattr(record, f"{status}_at", int(time.time()))
        self._store.save(record)
        logger.info("batch %s: %s", record.id, status)


def _read_input(path: Path, endpoint: str) -> tuple[list[BatchRequest], list[LineError]]:
    requests: list[BatchRequest] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    for number, line in _lines(path):
        try:
            request = read_request(line)
            if request.url != endpoint:
                raise BatchFileError(f"url: must be the batch's endpoint {endpoint}, got {request.url}")
            if request.custom_id in seen:
                raise BatchFileError(f"custom_id: {request.custom_id[:64]!r} is used twice")
            if len(requests) >= LIMITS.batch_lines:
                return [], [LineError("too_many_lines", f"at most {LIMITS.batch_lines} requests", number)]
            seen.add(request.custom_id)
            requests.append(request)
        except BatchFileError as error:
            name, _, _ = str(error).partition(": ")
            errors.append(LineError("invalid_line", str(error), number, name if name.isidentifier() else None))
            if len(errors) >= _SHOWN_ERRORS:
                break
    if not requests and not errors:
        errors.append(LineError("empty_file", "the file holds no request"))
    return requests, errors


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as source:
        for number, line in enumerate(source, start=1):
            if line.strip():
                yield number, line


def _count(path: Path) -> tuple[int, int]:
    """(completed, failed) of the results so far."""
    good, bad = _split(path)
    return good.count(b"\n"), bad.count(b"\n")


def _split(path: Path) -> tuple[bytes, bytes]:
    """Result lines that succeeded, and those that failed."""
    good: list[str] = []
    bad: list[str] = []
    if path.exists():
        for _, line in _lines(path):
            (good if json.loads(line)["error"] is None else bad).append(line)
    return "".join(good).encode(), "".join(bad).encode()


async def _post(app: App, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request that this process makes to its own application."""
    scope: MutableMapping[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("batch", 0),
        "server": ("batch", 0), "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    start: MutableMapping[str, Any] = {}
    parts: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        for message in messages:
            return message
        await asyncio.Event().wait()  # the client stays until it has its answer
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(parts)
