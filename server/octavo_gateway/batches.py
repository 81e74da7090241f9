"""Tenants' files and batches at the door: each line of a batch is a request like every other, after all of them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import time
from collections.abc import Callable, Mapping
from hashlib import blake2s
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from octavo_batches.api import BatchApi, CreateBatch
from octavo_batches.errors import BatchError, StoreError
from octavo_batches.in_process import post
from octavo_batches.lines import BatchRequest
from octavo_batches.records import BatchRecord
from octavo_batches.runner import Answer, BatchRunner, PausedError
from octavo_batches.store import BatchStore, StoreLimits
from octavo_gateway.errors import (
    BadRequestError,
    BodyTooLargeError,
    ConfigError,
    GatewayError,
    MethodNotAllowedError,
    RouteNotFoundError,
)
from octavo_gateway.exchange import BATCH, Exchange
from octavo_gateway.http_protocol import CLIENT, ClientConnection
from octavo_gateway.tenancy import Identity

if TYPE_CHECKING:
    from octavo_gateway.app import Gateway

log = logging.getLogger("octavo.gateway.batches")

BATCH_PATHS = ("/v1/files", "/v1/batches")
UNSURE = frozenset({502, 504})  # a replica died; the line is tried again
MAX_FILES, MAX_OPEN_BATCHES, MAX_LINES = 1_000, 100, 50_000
MAX_RUNNING, MAX_RUNNING_OF_TENANT = 64, 4  # others wait for their turn
MAX_LINES_AT_A_TIME, MAX_LINES_OF_TENANT = 256, 32
POLL_S = 1.0
PURGE_EVERY_S = 60.0
_CHUNK_BYTES = 256 * 1024
_DISCARDED_BYTES, _DISCARD_S = 64 * 1024 * 1024, 5.0
_FORM_BYTES = 16 * 1024  # of an upload, besides the file


class GatewayBatches:
    """The routes of all workers, and the runner of the one that holds the folder's lock."""

    def __init__(self, gateway: Gateway, folder: str) -> None:
        """Raises `ConfigError` for a folder that cannot be used."""
        settings = gateway.settings
        limits = StoreLimits(
            files=MAX_FILES,
            open_batches=MAX_OPEN_BATCHES,
            lines=MAX_LINES,
            bytes=settings.batch_tenant_bytes,
            retention_s=int(settings.batch_retention),
        )
        try:
            self._store = BatchStore(Path(folder), limits)
            self._lock = (Path(folder) / "runner.lock").open("ab")
        except (StoreError, OSError) as error:
            raise ConfigError(f"batch_folder: {error}") from error
        self._gateway = gateway
        self._runner = BatchRunner(
            self._store,
            self._ask,
            unsure=UNSURE,
            max_running=MAX_RUNNING,
            max_running_of_tenant=MAX_RUNNING_OF_TENANT,
        )
        self._slots = asyncio.Semaphore(MAX_LINES_AT_A_TIME)
        self._tenant_slots: dict[str, tuple[int, asyncio.Semaphore]] = {}
        self._created = asyncio.Event()
        self._api = BatchApi(self._store, lambda _: self._created.set())

    async def run(self) -> None:
        """Run what is open, in one worker of all that share the folder, until cancelled. Whoever dies lets go of the
        lock, and another goes on."""
        purged_at = 0.0
        while True:
            if self._holds_lock() and not self._gateway.leaving:
                self._runner.resume()
                if time.monotonic() - purged_at > PURGE_EVERY_S:
                    purged_at = time.monotonic()
                    await asyncio.to_thread(self._store.purge, time.time())
            self._created.clear()
            try:
                await asyncio.wait_for(self._created.wait(), POLL_S)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Leave every batch as it is, for the next process."""
        await self._runner.close()
        self._lock.close()
        await asyncio.to_thread(self._store.close)

    def _holds_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    # ---- a line

    async def _ask(self, record: BatchRecord, request: BatchRequest, on_answer: Callable[[Answer], None]) -> None:
        body = {name: value for name, value in request.body.items() if name != "priority"}
        line = blake2s(request.custom_id.encode(), digest_size=8).hexdigest()
        named = {"x-request-id": f"{record.id}:{line}"}  # the same for every try, in the ledger and in logs
        inside = {BATCH: record, CLIENT: _NoClient(asyncio.get_running_loop())}
        async with self._slots_of(record.tenant), self._slots:
            if self._gateway.leaving:
                raise PausedError
            await post(self._gateway, request.url, json.dumps(body).encode(), named, on_answer, inside)

    def _slots_of(self, name: str) -> asyncio.Semaphore:
        """Half of what the tenant may have at a time, so that its people are served beside its batches."""
        directory = self._gateway.accounts.directory
        tenant = directory.tenants.get(name) if directory is not None else None
        allowed = tenant.limits.max_concurrent_requests if tenant is not None else None
        count = MAX_LINES_OF_TENANT if allowed is None else max(1, min(MAX_LINES_OF_TENANT, allowed // 2))
        known = self._tenant_slots.get(name)
        if known is None or known[0] != count:
            known = self._tenant_slots[name] = (count, asyncio.Semaphore(count))
        return known[1]

    # ---- the routes

    async def serve(self, exchange: Exchange, identity: Identity | None) -> None:
        """Answer one request; raises `GatewayError`."""
        tenant = identity.tenant.name if identity is not None else ""
        _, _, kind, *rest = exchange.path.split("/")
        query = dict(parse_qsl(exchange.scope["query_string"].decode("latin-1")))
        try:
            match exchange.method, kind, *rest:
                case "POST", "files":
                    await self._upload(exchange, tenant)
                case "GET", "files":
                    await _respond(exchange, self._api.list_files(tenant, query))
                case "GET", "files", file_id:
                    await _respond(exchange, self._api.file(tenant, file_id))
                case "DELETE", "files", file_id:
                    await _respond(exchange, self._api.delete_file(tenant, file_id))
                case "GET", "files", file_id, "content":
                    await self._send(exchange, self._api.content(tenant, file_id))
                case "POST", "batches":
                    await _respond(exchange, self._api.create(tenant, await self._creation(exchange)))
                case "GET", "batches":
                    await _respond(exchange, self._api.list_batches(tenant, query))
                case "GET", "batches", batch_id:
                    await _respond(exchange, self._api.batch(tenant, batch_id))
                case "POST", "batches", batch_id, "cancel":
                    await _respond(exchange, self._api.cancel(tenant, batch_id))
                case _, ("files" | "batches"), *more if len(more) <= 2:
                    raise MethodNotAllowedError(f"{exchange.method} is not allowed on {exchange.path[:200]}.")
                case _:
                    raise RouteNotFoundError(f"There is no {exchange.method} {exchange.path[:200]} here.")
        except BatchError as error:
            raise _refusal(error) from None

    async def _upload(self, exchange: Exchange, tenant: str) -> None:
        settings = self._gateway.settings
        try:
            receive = exchange.bounded_receive(settings.batch_file_bytes + _FORM_BYTES, settings.request_timeout)
            async with Request(exchange.scope, receive).form(max_files=1, max_fields=8, max_part_size=4_096) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise BadRequestError("file: missing; this field is required.", param="file")
                name = file.filename or ""
                stored = await asyncio.to_thread(self._api.upload, tenant, name, purpose, file.file)
        except BodyTooLargeError:
            await exchange.discard_body(_DISCARDED_BYTES, _DISCARD_S)
            raise
        except HTTPException as error:
            raise BadRequestError(f"The body is no multipart form: {str(error.detail)[:200]}") from None
        await _respond(exchange, stored)

    async def _creation(self, exchange: Exchange) -> CreateBatch:
        settings = self._gateway.settings
        body = await exchange.read_body(settings.max_body_bytes, settings.body_timeout)
        try:
            return msgspec.json.decode(body, type=CreateBatch)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            message, _, path = str(error).partition(" - at `$.")
            field = path.rstrip("`") or None
            raise BadRequestError(f"{field or 'body'}: {message}.", param=field) from None

    async def _send(self, exchange: Exchange, path: Path) -> None:
        with path.open("rb") as content:
            own = [(b"content-type", b"application/octet-stream"), (b"x-request-id", exchange.request_id.encode())]
            await exchange.start(200, own)
            while data := await asyncio.to_thread(content.read, _CHUNK_BYTES):
                await exchange.write(data)
            await exchange.finish()


class _NoClient(ClientConnection):
    """The client's side of a request that this process makes: it never leaves and reads as fast as one writes."""

    __slots__ = ()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._on_gone = self.on_writable = None

    @property
    def body_complete(self) -> bool:
        return True

    def watch(self, on_gone: Callable[[], None]) -> None:
        self._on_gone = on_gone

    def write(self, data: bytes) -> bool:
        raise NotImplementedError("lines of a batch do not stream")


async def _respond(exchange: Exchange, document: Mapping[str, Any]) -> None:
    await exchange.respond(200, json.dumps(document, ensure_ascii=False).encode())


def _refusal(error: BatchError) -> GatewayError:
    refusal = GatewayError(error.message, param=error.param, retry_after_s=error.retry_after_s)
    refusal.status, refusal.kind, refusal.code = error.status, "invalid_request_error", error.code
    return refusal
