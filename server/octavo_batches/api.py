"""`/v1/files` and `/v1/batches` as operations of one tenant; the faces only carry requests here and answers back."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from msgspec import Meta, Struct

from octavo_batches.errors import BatchError
from octavo_batches.lines import ROUTES
from octavo_batches.records import BatchRecord, FileRecord, shown
from octavo_batches.store import BatchStore

PURPOSES = ("batch",)
WINDOW_S = {"24h": 86_400}
_FILE_NAME_CHARS = 128


class CreateBatch(Struct, frozen=True, kw_only=True):
    """`POST /v1/batches`."""

    input_file_id: Annotated[str, Meta(max_length=128)]
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None


class BatchApi:
    """Every operation raises `BatchError` for what the caller cannot have."""

    def __init__(self, store: BatchStore, on_created: Callable[[BatchRecord], None]) -> None:
        self._store = store
        self._on_created = on_created

    def upload(self, tenant: str, filename: str, purpose: object, content: BinaryIO) -> dict[str, Any]:
        """Store a file of batch requests. Copies it: call it off the event loop."""
        if purpose not in PURPOSES:
            raise BatchError(400, f"purpose: must be one of {', '.join(PURPOSES)}", param="purpose")
        name = (filename or "upload.jsonl")[:_FILE_NAME_CHARS]
        return shown(self._store.add_file(tenant, name, str(purpose), content))

    def list_files(self, tenant: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A page of files, the newest first."""
        purpose = query.get("purpose")
        return _page([file for file in self._store.files(tenant) if purpose in (None, file.purpose)], query)

    def file(self, tenant: str, file_id: str) -> dict[str, Any]:
        """Describe a file."""
        return shown(self._store.file(tenant, file_id))

    def content(self, tenant: str, file_id: str) -> Path:
        """Where the file itself is."""
        return self._store.content_path(self._store.file(tenant, file_id))

    def delete_file(self, tenant: str, file_id: str) -> dict[str, Any]:
        """Delete a file."""
        record = self._store.file(tenant, file_id)
        self._store.delete_file(record)
        return {"id": record.id, "object": "file", "deleted": True}

    def create(self, tenant: str, request: CreateBatch) -> dict[str, Any]:
        """Run a file of requests when there is time."""
        for name, allowed in (("endpoint", ROUTES), ("completion_window", tuple(WINDOW_S))):
            if getattr(request, name) not in allowed:
                raise BatchError(400, f"{name}: must be one of {', '.join(allowed)}", param=name)
        self._store.file(tenant, request.input_file_id, "input_file_id")
        now = int(time.time())
        record = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            created_at=now,
            expires_at=now + WINDOW_S[request.completion_window],
            tenant=tenant,
            metadata=request.metadata,
        )
        self._store.add_batch(record)
        answer = shown(record)
        self._on_created(record)
        return answer

    def list_batches(self, tenant: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A page of batches, the newest first."""
        return _page(self._store.batches(tenant), query)

    def batch(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """How far a batch is."""
        return shown(self._store.batch(tenant, batch_id))

    def cancel(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """Stop a batch; its results so far are kept."""
        self._store.cancel(self._store.batch(tenant, batch_id))
        return shown(self._store.batch(tenant, batch_id))


def _page(records: Sequence[FileRecord | BatchRecord], query: Mapping[str, str]) -> dict[str, Any]:
    """One page of a list: `limit` records behind the one that `after` names."""
    limit = query.get("limit", "20")
    if not limit.isdigit() or not 1 <= int(limit[:6]) <= 10_000:
        raise BatchError(400, "limit: must be an integer from 1 to 10000", param="limit")
    if query.get("order", "desc") == "asc":
        records = records[::-1]
    after = query.get("after")
    if after:
        ids = [record.id for record in records]
        if after not in ids:
            raise BatchError(400, f"after: there is no {after[:64]!r}", param="after")
        records = records[ids.index(after) + 1 :]
    page = records[: int(limit)]
    return {
        "object": "list",
        "data": [shown(record) for record in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(page) < len(records),
    }
