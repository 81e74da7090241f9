"""The HTTP application of one replica: faces put together, errors in each face's own shape."""

from __future__ import annotations

import json

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from octavo_server import observation
from octavo_server.batches import routes as batches
from octavo_server.boundary import RequestBoundary
from octavo_server.errors import INTERNAL_ERROR, ApiError
from octavo_server.oip import http as open_inference
from octavo_server.oip.repository import Repository
from octavo_server.openai import adapters, chat, classification, completions, embeddings, models, ranking, tokens
from octavo_server.openapi import add_openapi
from octavo_server.replica import VERSION, Replica
from octavo_server.responses import routes as responses


def build_app(replica: Replica, repository: Repository | None = None) -> RequestBoundary:
    """Every route behind the request boundary. `repository` is shared with the gRPC face where there is one."""
    # Requests are traced at the boundary, where all of their time is seen.
    untraced: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}
    app = FastAPI(title="Octavo", version=VERSION, redoc_url=None, telemetry=untraced)
    for face in (
        observation,
        models,
        adapters,
        chat,
        completions,
        responses,
        tokens,
        embeddings,
        ranking,
        classification,
    ):
        app.include_router(face.router(replica))
    app.include_router(batches.router(replica.batches))
    app.include_router(open_inference.router(replica, repository or Repository(replica)))
    add_openapi(app)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        replica.metrics.rejected(error.reason)
        return _error_response(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        refusal = ApiError(error.status_code, _http_message(error, request), reason=f"http_{error.status_code}")
        replica.metrics.rejected(refusal.reason)
        return _error_response(request.url.path, refusal, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        replica.metrics.rejected("internal_error")
        return _error_response(request.url.path, ApiError(500, INTERNAL_ERROR))

    boundary = RequestBoundary(
        app,
        lifecycle=replica.lifecycle,
        metrics=replica.metrics,
        telemetry=replica.telemetry,
        usage=replica.usage,
        render_error=render_error,
        max_body_bytes=replica.settings.max_body_bytes,
        request_timeout_s=replica.settings.request_timeout,
    )
    if replica.batches is not None:
        replica.batches.bind(boundary)
    return boundary


def render_error(path: str, error: ApiError) -> bytes:
    """The error's body in the shape of the face that `path` belongs to."""
    body: object = {"error": error.message} if path == "/v2" or path.startswith("/v2/") else error.body()
    return json.dumps(body, ensure_ascii=False).encode()


def _error_response(path: str, error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        render_error(path, error),
        status_code=error.status,
        media_type="application/json",
        headers={**(headers or {}), **error.headers()},
    )


def _http_message(error: HTTPException, request: Request) -> str:
    path = request.url.path[:200]
    match error.status_code:
        case 404:
            return f"No route {request.method} {path}; GET /docs lists what this server offers."
        case 405:
            return f"{path} does not take {request.method}."
    return str(error.detail)
