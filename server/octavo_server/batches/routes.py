"""`/v1/files` and `/v1/batches`, as the official client calls them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from octavo_batches.api import BatchApi, CreateBatch
from octavo_batches.errors import BatchError
from octavo_server.batches.service import Batches
from octavo_server.caller import caller_of
from octavo_server.errors import ApiError, bad_request
from octavo_server.json_response import JsonResponse
from octavo_server.parsing import Refused, parse

_REFUSED = {"output_expires_after": Refused("files stay until they are deleted")}


def router(batches: Batches | None) -> APIRouter:
    """The routes; without a folder to keep files in they say what to set."""
    routes = APIRouter(tags=["batch"])

    def api() -> BatchApi:
        if batches is None:
            raise ApiError(501, "Files and batches are off; start the server with --batch-folder.", reason="no_batches")
        return batches.api

    @routes.post("/v1/files")
    async def upload(http: Request) -> Response:
        """Store a file of batch requests."""
        tenant, batch_api = caller_of(http).tenant, api()
        try:
            async with http.form(max_files=1, max_fields=8, max_part_size=4_096) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise bad_request("file: missing; this field is required", "file")
                with _refusals():
                    return JsonResponse(
                        await asyncio.to_thread(batch_api.upload, tenant, file.filename or "", purpose, file.file)
                    )
        except HTTPException as error:
            raise bad_request(f"The body is no multipart form: {str(error.detail)[:200]}") from None

    @routes.get("/v1/files")
    async def list_files(http: Request) -> Response:
        """List files, the newest first."""
        return _answer(api().list_files, http, http.query_params)

    @routes.get("/v1/files/{file_id}")
    async def get_file(file_id: str, http: Request) -> Response:
        """Describe a file."""
        return _answer(api().file, http, file_id)

    @routes.get("/v1/files/{file_id}/content")
    async def file_content(file_id: str, http: Request) -> Response:
        """The file itself."""
        with _refusals():
            return FileResponse(api().content(caller_of(http).tenant, file_id), media_type="application/octet-stream")

    @routes.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, http: Request) -> Response:
        """Delete a file."""
        return _answer(api().delete_file, http, file_id)

    @routes.post("/v1/batches")
    async def create(http: Request) -> Response:
        """Run a file of requests when there is time."""
        batch_api = api()
        return _answer(batch_api.create, http, parse(await http.body(), CreateBatch, _REFUSED).request)

    @routes.get("/v1/batches")
    async def list_batches(http: Request) -> Response:
        """List batches, the newest first."""
        return _answer(api().list_batches, http, http.query_params)

    @routes.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str, http: Request) -> Response:
        """How far a batch is."""
        return _answer(api().batch, http, batch_id)

    @routes.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, http: Request) -> Response:
        """Stop a batch; its results so far are kept."""
        return _answer(api().cancel, http, batch_id)

    return routes


T = TypeVar("T")


def _answer(operation: Callable[[str, T], dict[str, Any]], http: Request, argument: T) -> Response:
    with _refusals():
        return JsonResponse(operation(caller_of(http).tenant, argument))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except BatchError as error:
        raise ApiError(
            error.status,
            error.message,
            param=error.param,
            retry_after_s=error.retry_after_s,
            reason=error.code or "",
        ) from None
