"""`/v1/files` and `/v1/batches`, as the official client calls them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from octavo_server.batches.lines import ROUTES
from octavo_server.batches.service import Batches
from octavo_server.batches.store import BatchRecord, FileRecord
from octavo_server.caller import caller_of
from octavo_server.errors import ApiError, bad_request
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai.request_types import Identifier
from octavo_server.parsing import Refused, parse

PURPOSES = ("batch",)
WINDOW_S = {"24h": 86_400}
_REFUSED = {"output_expires_after": Refused("files stay until they are deleted")}


class CreateBatch(Struct, frozen=True, kw_only=True):
    """`POST /v1/batches`."""

    input_file_id: Identifier
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None


def router(batches: Batches | None) -> APIRouter:
    """The routes; without a folder to keep files in they say what to set."""
    routes = APIRouter(tags=["batch"])

    def enabled() -> Batches:
        if batches is None:
            raise ApiError(501, "Files and batches are off; start the server with --batch-folder.", reason="no_batches")
        return batches

    @routes.post("/v1/files")
    async def upload(http: Request) -> Response:
        """Store a file of batch requests."""
        store = enabled().store
        filename, purpose, content = await _read_upload(http)
        tenant = caller_of(http).tenant
        return JsonResponse(_shown(await asyncio.to_thread(store.add_file, tenant, filename, purpose, content)))

    @routes.get("/v1/files")
    async def list_files(http: Request) -> Response:
        """List files, the newest first."""
        files = enabled().store.files(caller_of(http).tenant)
        purpose = http.query_params.get("purpose")
        return _page([file for file in files if purpose in (None, file.purpose)], http)

    @routes.get("/v1/files/{file_id}")
    async def get_file(file_id: str, http: Request) -> Response:
        """Describe a file."""
        return JsonResponse(_shown(enabled().store.file(caller_of(http).tenant, file_id)))

    @routes.get("/v1/files/{file_id}/content")
    async def file_content(file_id: str, http: Request) -> Response:
        """The file itself."""
        store = enabled().store
        record = store.file(caller_of(http).tenant, file_id)
        return FileResponse(store.content_path(record), media_type="application/octet-stream")

    @routes.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, http: Request) -> Response:
        """Delete a file."""
        store = enabled().store
        record = store.file(caller_of(http).tenant, file_id)
        store.delete_file(record)
        return JsonResponse({"id": record.id, "object": "file", "deleted": True})

    @routes.post("/v1/batches")
    async def create(http: Request) -> Response:
        """Run a file of requests when there is time."""
        service = enabled()
        request = parse(await http.body(), CreateBatch, _REFUSED).request
        if request.endpoint not in ROUTES:
            raise bad_request(f"endpoint: must be one of {', '.join(ROUTES)}", "endpoint")
        if request.completion_window not in WINDOW_S:
            raise bad_request(f"completion_window: must be one of {', '.join(WINDOW_S)}", "completion_window")
        tenant = caller_of(http).tenant
        service.store.file(tenant, request.input_file_id, "input_file_id")
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
        service.store.add_batch(record)
        service.runner.start(record)
        return JsonResponse(_shown(record))

    @routes.get("/v1/batches")
    async def list_batches(http: Request) -> Response:
        """List batches, the newest first."""
        return _page(enabled().store.batches(caller_of(http).tenant), http)

    @routes.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str, http: Request) -> Response:
        """How far a batch is."""
        return JsonResponse(_shown(enabled().store.batch(caller_of(http).tenant, batch_id)))

    @routes.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, http: Request) -> Response:
        """Stop a batch; its results so far are kept."""
        service = enabled()
        record = service.store.batch(caller_of(http).tenant, batch_id)
        service.runner.cancel(record)
        return JsonResponse(_shown(record))

    return routes


async def _read_upload(http: Request) -> tuple[str, str, bytes]:
    """(file name, purpose, content) of a multipart form; raises a 400 naming the part."""
    try:
        async with http.form(max_files=1, max_fields=8, max_part_size=4_096) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise bad_request("file: missing; this field is required", "file")
            if purpose not in PURPOSES:
                raise bad_request(f"purpose: must be one of {', '.join(PURPOSES)}", "purpose")
            return (file.filename or "upload.jsonl")[: LIMITS.identifier_chars], str(purpose), await file.read()
    except HTTPException as error:
        raise bad_request(f"The body is no multipart form: {str(error.detail)[:200]}") from None


def _page(records: Sequence[FileRecord | BatchRecord], http: Request) -> Response:
    """One page of a list: `limit` records behind the one that `after` names."""
    limit = http.query_params.get("limit", "20")
    if not limit.isdigit() or not 1 <= int(limit[:6]) <= 10_000:
        raise bad_request("limit: must be an integer from 1 to 10000", "limit")
    if http.query_params.get("order", "desc") == "asc":
        records = records[::-1]
    after = http.query_params.get("after")
    if after:
        ids = [record.id for record in records]
        if after not in ids:
            raise bad_request(f"after: there is no {after[:64]!r}", "after")
        records = records[ids.index(after) + 1 :]
    shown = records[: int(limit)]
    return JsonResponse({
        "object": "list",
        "data": [_shown(record) for record in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(shown) < len(records),
    })  # fmt: skip


def _shown(record: FileRecord | BatchRecord) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(record)
    del values["tenant"]
    return values
