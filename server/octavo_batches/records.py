"""Files and batches as OpenAI's API shows them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
OPEN: frozenset[BatchStatus] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})


class FileRecord(msgspec.Struct, kw_only=True):
    """A stored file. `tenant` is not shown. Times are seconds since the epoch."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    tenant: str
    expires_at: int | None = None
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
    """A batch. `tenant` is not shown. Times are seconds since the epoch."""

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


def shown(record: FileRecord | BatchRecord) -> dict[str, Any]:
    """What the API answers."""
    values: dict[str, Any] = msgspec.to_builtins(record)
    del values["tenant"]
    return values
