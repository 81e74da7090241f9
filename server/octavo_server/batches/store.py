"""Files and batch records in a folder, each seen by the tenant it belongs to alone."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from octavo_engine.errors import ConfigError
from octavo_server.errors import ApiError, bad_request
from octavo_server.limits import LIMITS

BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
OPEN: frozenset[BatchStatus] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})


class FileRecord(msgspec.Struct, kw_only=True):
    """A stored file, in OpenAI's words. `tenant` is not shown."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    tenant: str
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of the input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class LineErrors(msgspec.Struct, frozen=True):
    """OpenAI's list of them."""

    data: list[LineError]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct):
    """How many of a batch's requests ended, and how."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchRecord(msgspec.Struct, kw_only=True):
    """A batch, in OpenAI's words. `tenant` is not shown. Times are seconds since the epoch."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    tenant: str
    object: Literal["batch"] = "batch"
    status: BatchStatus = "validating"
    errors: LineErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


Record = TypeVar("Record", FileRecord, BatchRecord)


class BatchStore:
    """Records are kept in memory and written through; contents stay in the folder. Raises `ApiError` to callers."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier process left; raises `ConfigError`."""
        self._folder = folder
        try:
            for part in ("files", "batches"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            self._files = _read(folder / "files", FileRecord)
            self._batches = _read(folder / "batches", BatchRecord)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"batch_folder {folder}: cannot be used: {error}") from error

    def add_file(self, tenant: str, filename: str, purpose: str, content: bytes) -> FileRecord:
        """Keep a file; a 400 when the tenant has as many as one may have. Writes to disk: call off the event loop."""
        if len(self.files(tenant)) >= LIMITS.stored_files:
            raise bad_request(f"file: {LIMITS.stored_files} files are stored already; delete some", "file")
        record = FileRecord(
            id=f"file-{uuid.uuid4().hex}",
            bytes=len(content),
            created_at=int(time.time()),
            filename=filename,
            purpose=purpose,
            tenant=tenant,
        )
        self.content_path(record).write_bytes(content)
        self._files[record.id] = record
        _write(self._folder / "files" / f"{record.id}.json", record)
        return record

    def file(self, tenant: str, file_id: str, param: str = "file_id") -> FileRecord:
        """A tenant's own file; raises a 404, also for those of others."""
        return _own(self._files, tenant, file_id, param)

    def files(self, tenant: str) -> list[FileRecord]:
        """A tenant's files, the newest first."""
        return _newest_first(self._files.values(), tenant)

    def content_path(self, record: FileRecord) -> Path:
        return self._folder / "files" / f"{record.id}.content"

    def delete_file(self, record: FileRecord) -> None:
        """Forget a file; a 400 while a batch reads it."""
        if any(batch.status in OPEN and batch.input_file_id == record.id for batch in self._batches.values()):
            raise bad_request(f"file_id: {record.id} is read by a batch that has not ended", "file_id")
        del self._files[record.id]
        (self._folder / "files" / f"{record.id}.json").unlink(missing_ok=True)
        self.content_path(record).unlink(missing_ok=True)

    def add_batch(self, record: BatchRecord) -> None:
        """Keep a new batch; a 429 when too many of the tenant are open."""
        if sum(batch.status in OPEN for batch in self.batches(record.tenant)) >= LIMITS.open_batches:
            raise ApiError(
                429, f"{LIMITS.open_batches} batches are open already.", retry_after_s=60.0, reason="open_batches"
            )
        self._batches[record.id] = record
        self.save(record)

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """A tenant's own batch; raises a 404, also for those of others."""
        return _own(self._batches, tenant, batch_id, "batch_id")

    def batches(self, tenant: str) -> list[BatchRecord]:
        """A tenant's batches, the newest first."""
        return _newest_first(self._batches.values(), tenant)

    def open_batches(self) -> list[BatchRecord]:
        """Everyone's batches that have not ended, the oldest first."""
        return sorted((b for b in self._batches.values() if b.status in OPEN), key=lambda batch: batch.created_at)

    def save(self, record: BatchRecord) -> None:
        """Write a changed batch."""
        _write(self._folder / "batches" / f"{record.id}.json", record)

    def results_path(self, record: BatchRecord) -> Path:
        """Where results are collected while a batch runs."""
        return self._folder / "batches" / f"{record.id}.results"


def _read(folder: Path, kind: type[Record]) -> dict[str, Record]:
    records = [msgspec.json.decode(path.read_bytes(), type=kind) for path in sorted(folder.glob("*.json"))]
    return {record.id: record for record in records}


def _write(path: Path, record: FileRecord | BatchRecord) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(record))
    partial.replace(path)


def _own(records: dict[str, Record], tenant: str, record_id: str, param: str) -> Record:
    record = records.get(record_id)
    if record is None or record.tenant != tenant:
        raise ApiError(404, f"{param}: there is no {record_id[:64]!r}", param=param, reason="unknown_id")
    return record


def _newest_first(records: Iterable[Record], tenant: str) -> list[Record]:
    own = [record for record in records if record.tenant == tenant]
    return sorted(own, key=lambda record: (record.created_at, record.id), reverse=True)
