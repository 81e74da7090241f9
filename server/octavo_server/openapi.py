"""The OpenAPI document: request bodies are msgspec structs, so their schemas are added to what FastAPI knows."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from octavo_server.oip.generate import GenerateBody
from octavo_server.oip.http_codec import InferBody
from octavo_server.openai.classification import ClassificationRequest
from octavo_server.openai.embeddings import EmbeddingRequest
from octavo_server.openai.ranking import RerankRequest, ScoreRequest
from octavo_server.openai.request_types import ChatCompletionRequest, CompletionRequest
from octavo_server.openai.tokens import DetokenizeRequest, TokenizeRequest
from octavo_server.responses.request import ResponsesRequest

BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/classify": ClassificationRequest,
    "/v1/score": ScoreRequest,
    "/v1/rerank": RerankRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v2/models/{name}/infer": InferBody,
    "/v2/models/{name}/generate": GenerateBody,
    "/v2/models/{name}/generate_stream": GenerateBody,
}


def add_openapi(app: FastAPI) -> None:
    """Serve a document with every request body at /openapi.json; made on first use."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = list(dict.fromkeys(BODIES.values()))
            references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
            made.setdefault("components", {}).setdefault("schemas", {}).update(components)
            for path, kind in BODIES.items():
                made["paths"][path]["post"]["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": references[kinds.index(kind)]}},
                }
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
