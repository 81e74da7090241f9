"""The v2 protocol over HTTP, with Triton's repository, statistics and generate extensions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.caller import Caller, caller_of
from octavo_server.errors import ApiError
from octavo_server.event_stream import EventStream, encode_event
from octavo_server.json_response import JsonResponse
from octavo_server.oip.generate import generate_request, generate_response
from octavo_server.oip.http_codec import HEADER_LENGTH, compress, decode_request, decompress, encode_response
from octavo_server.oip.models import InferRequest, with_parameters
from octavo_server.oip.repository import EXTENSIONS, SERVER_NAME, Repository, config, metadata, statistics
from octavo_server.parsing import json_object
from octavo_server.replica import VERSION as SERVER_VERSION
from octavo_server.replica import Replica

_MODEL = "/v2/models/{name}"
_MODEL_VERSION = "/v2/models/{name}/versions/{version}"


def router(replica: Replica, repository: Repository) -> APIRouter:
    """Server, model, inference and repository routes."""
    routes = APIRouter(tags=["open inference protocol"])
    _add_server_routes(routes, repository)
    _add_repository_routes(routes, repository)
    _add_model_routes(routes, repository)
    _add_inference_routes(routes, repository, replica)
    return routes


def _add_server_routes(routes: APIRouter, repository: Repository) -> None:
    @routes.get("/v2/health/live")
    async def live() -> Response:
        """200 while the process is well."""
        return Response(status_code=200 if repository.live else 503)

    @routes.get("/v2/health/ready")
    async def ready() -> Response:
        """200 when requests should be sent here."""
        return Response(status_code=200 if repository.ready else 503)

    @routes.get("/v2")
    async def server_metadata() -> Response:
        """Name, version and extensions of this server."""
        return JsonResponse({"name": SERVER_NAME, "version": SERVER_VERSION, "extensions": EXTENSIONS})

    @routes.get("/v2/logging")
    async def read_logging() -> Response:
        """Log settings."""
        return JsonResponse(repository.log_settings({}))

    @routes.post("/v2/logging")
    async def change_logging(http: Request) -> Response:
        """Change log settings."""
        return JsonResponse(repository.log_settings(json_object(await http.body())))

    @routes.get("/v2/trace/setting")
    @routes.get(f"{_MODEL}/trace/setting")
    async def read_trace() -> Response:
        """Trace settings."""
        return JsonResponse(repository.trace_settings({}))

    @routes.post("/v2/trace/setting")
    @routes.post(f"{_MODEL}/trace/setting")
    async def change_trace(http: Request) -> Response:
        """Refused unless nothing changes."""
        return JsonResponse(repository.trace_settings(json_object(await http.body())))

    @routes.api_route("/v2/{kind}sharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    async def shared_memory(kind: str, rest: str) -> Response:
        """Refused: clients never name memory of this host."""
        raise ApiError(501, "shared memory regions are not supported", reason="shared_memory")


def _add_repository_routes(routes: APIRouter, repository: Repository) -> None:
    @routes.post("/v2/repository/index")
    async def index(http: Request) -> Response:
        """Every served name with its state."""
        wanted = json_object(await http.body())
        return JsonResponse(repository.index(ready_only=bool(wanted.get("ready"))))

    @routes.post("/v2/repository/models/{name:path}/load")
    async def load(name: str, http: Request) -> Response:
        """Succeeds for the model that is served."""
        await repository.load(name, (json_object(await http.body())).get("parameters") or {})
        return JsonResponse({})

    @routes.post("/v2/repository/models/{name:path}/unload")
    async def unload(name: str) -> Response:
        """Refused."""
        repository.unload(name)
        return JsonResponse({})


def _add_model_routes(routes: APIRouter, repository: Repository) -> None:
    @routes.get("/v2/models/stats")
    async def all_statistics() -> Response:
        """Statistics of every model."""
        return JsonResponse({"model_stats": [statistics(model) for model in repository.models]})

    @routes.get(f"{_MODEL}/stats")
    @routes.get(f"{_MODEL_VERSION}/stats")
    async def model_statistics(name: str, version: str = "") -> Response:
        """Statistics of one model."""
        return JsonResponse({"model_stats": [statistics(repository.find(name, version))]})

    @routes.get(f"{_MODEL}/ready")
    @routes.get(f"{_MODEL_VERSION}/ready")
    async def model_ready(name: str, version: str = "") -> Response:
        """200 when inference on this model works."""
        return Response(status_code=200 if repository.model_ready(name, version) else 503)

    @routes.get(f"{_MODEL}/config")
    @routes.get(f"{_MODEL_VERSION}/config")
    async def model_config(name: str, version: str = "") -> Response:
        """Triton's model configuration."""
        return JsonResponse(config(repository.find(name, version)))

    @routes.get(_MODEL)
    @routes.get(_MODEL_VERSION)
    async def model_metadata(name: str, version: str = "") -> Response:
        """The tensors a model takes and gives."""
        return JsonResponse(metadata(repository.find(name, version)))


def _add_inference_routes(routes: APIRouter, repository: Repository, replica: Replica) -> None:
    @routes.post(f"{_MODEL}/infer")
    @routes.post(f"{_MODEL_VERSION}/infer")
    async def infer(name: str, http: Request, version: str = "") -> Response:
        """Tensors in, tensors out."""
        model = repository.find(name, version)
        body = decompress(await http.body(), http.headers.get("content-encoding"))
        decoded = await replica.text.run(decode_request, body, http.headers.get(HEADER_LENGTH))
        response = await model.infer_once(decoded.request, _caller(http, decoded.request))
        content, header_length = encode_response(name, model.version, decoded, response.outputs)
        content, encoding = compress(content, http.headers.get("accept-encoding", ""))
        headers = {} if encoding is None else {"content-encoding": encoding}
        if header_length is not None:
            headers[HEADER_LENGTH] = str(header_length)
        kind = "application/json" if header_length is None else "application/octet-stream"
        return Response(content, media_type=kind, headers=headers)

    @routes.post(f"{_MODEL}/generate")
    @routes.post(f"{_MODEL_VERSION}/generate")
    async def generate(name: str, http: Request, version: str = "") -> Response:
        """Text in, text out, as flat JSON."""
        model = repository.find(name, version)
        request = generate_request(await http.body(), model.inputs, stream=False)
        response = await model.infer_once(request, _caller(http, request))
        return JsonResponse(generate_response(name, request.id, response))

    @routes.post(f"{_MODEL}/generate_stream")
    @routes.post(f"{_MODEL_VERSION}/generate_stream")
    async def generate_stream(name: str, http: Request, version: str = "") -> Response:
        """Text in, server-sent events out; `stream` false gives one event."""
        model = repository.find(name, version)
        request = generate_request(await http.body(), model.inputs, stream=True)
        run = model.infer(request, _caller(http, request))
        first = await anext(run)
        return EventStream(_generate_events(name, request, first, run, replica), source=run)


async def _generate_events(
    name: str, request: InferRequest, first: Any, run: AsyncGenerator[Any, None], replica: Replica
) -> AsyncGenerator[bytes, None]:
    yield encode_event(generate_response(name, request.id, first))
    try:
        async with contextlib.aclosing(run):
            async for response in run:
                yield encode_event(generate_response(name, request.id, response))
    except ApiError as error:
        replica.metrics.rejected(error.reason)
        yield encode_event({"error": error.message})


def _caller(http: Request, request: InferRequest) -> Caller:
    return with_parameters(caller_of(http), request)
