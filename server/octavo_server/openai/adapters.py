"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM offers them."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from octavo_engine.config import MAX_ADAPTER_NAME
from octavo_engine.errors import OctavoError
from octavo_server.errors import ApiError, bad_request, from_engine_error
from octavo_server.parsing import parse
from octavo_server.replica import Replica

AdapterName = Annotated[str, Meta(min_length=1, max_length=MAX_ADAPTER_NAME)]


class LoadAdapterRequest(Struct, frozen=True, kw_only=True):
    """`load_inplace` replaces an adapter of the same name once nothing uses it any more."""

    lora_name: AdapterName
    lora_path: Annotated[str, Meta(min_length=1, max_length=1_024)]
    load_inplace: bool = False


class UnloadAdapterRequest(Struct, frozen=True, kw_only=True):
    """The adapter to forget. `lora_int_id` is what vLLM's clients send too; names are enough here."""

    lora_name: AdapterName
    lora_int_id: int | None = None


def router(replica: Replica) -> APIRouter:
    """Adapters come and go while the replica runs, where whoever started it allowed that."""
    routes = APIRouter(tags=["models"])

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(http: Request) -> Response:
        """Load an adapter from a folder under the server's adapter root."""
        request = parse(await http.body(), LoadAdapterRequest).request
        name = request.lora_name
        _check_allowed(replica)
        if name in replica.served.names or not name.isprintable():
            raise bad_request(f"lora_name: {name!r} is the model's own name or not printable", "lora_name")
        try:
            await replica.engine.load_adapter(
                request_id=f"adapter-{uuid.uuid4().hex}",
                name=name,
                path=request.lora_path,
                replace=request.load_inplace,
            )
        except OctavoError as error:
            raise from_engine_error(error) from error
        return PlainTextResponse(f"Success: LoRA adapter {name!r} loaded.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(http: Request) -> Response:
        """Forget an adapter; answers once the requests that used it have ended."""
        request = parse(await http.body(), UnloadAdapterRequest).request
        name = request.lora_name
        _check_allowed(replica)
        if name not in replica.served.adapters():
            raise ApiError(404, f"lora_name: {name!r} is not loaded", param="lora_name", reason="unknown_model")
        try:
            await replica.engine.unload_adapter(request_id=f"adapter-{uuid.uuid4().hex}", name=name)
        except OctavoError as error:
            raise from_engine_error(error) from error
        return PlainTextResponse(f"Success: LoRA adapter {name!r} unloaded.")

    return routes


def _check_allowed(replica: Replica) -> None:
    settings = replica.settings
    if not settings.enable_lora or not settings.lora_root:
        raise bad_request(
            "Adapters cannot be changed at run time here; start the server with --enable-lora and --lora-root FOLDER."
        )
