"""`POST /v1/embeddings`: texts to vectors."""

from __future__ import annotations

import base64
import math
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.caller import caller_of
from octavo_server.errors import bad_request
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai import pooled
from octavo_server.openai.request_types import TokenId
from octavo_server.openai.texts import text_inputs
from octavo_server.parsing import Refused
from octavo_server.replica import Replica


class EmbeddingRequest(pooled.PooledRequest, frozen=True, kw_only=True):
    """`dimensions` keeps the first so many (Matryoshka), renormalized; base64 is little-endian float32."""

    input: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    add_special_tokens: bool | None = None
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["little"] | None = None


class Embedding(Struct, frozen=True):
    """One text's vector."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingResponse(Struct, frozen=True, kw_only=True):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: pooled.Usage


REFUSED = {
    **pooled.REFUSED,
    "messages": Refused("not supported; send texts in input"),
    "request_id": Refused("not supported; use the header X-Request-Id"),
    "truncation_side": Refused("texts are cut at their end", off=('"right"',)),
}


def router(replica: Replica) -> APIRouter:
    """The embeddings route."""
    routes = APIRouter(tags=["embed"])

    @routes.post("/v1/embeddings")
    async def embeddings(http: Request) -> Response:
        """Turn one or more texts into vectors."""
        served = replica.served
        request, model = await pooled.read_request(http, replica, EmbeddingRequest, REFUSED, "embed", "/v1/embeddings")
        _check_dimensions(request.dimensions, served.info.hidden_size)
        vectors = await replica.embedder.embed_texts(
            text_inputs(request.input, "input", LIMITS.embed_inputs),
            caller_of(http),
            param="input",
            truncate=request.truncate_prompt_tokens,
            add_special_tokens=request.add_special_tokens is not False,
        )
        usage = pooled.usage_of(vectors)
        http.scope["state"]["log_fields"] = {"model": model, "prompt_tokens": usage.prompt_tokens}
        data = [
            Embedding(index, _encoded(_cut(vector.values, request.dimensions), request.encoding_format))
            for index, vector in enumerate(vectors)
        ]
        return JsonResponse(EmbeddingResponse(data=data, model=model, usage=usage))

    return routes


def _check_dimensions(dimensions: int | None, size: int) -> None:
    if dimensions is not None and dimensions > size:
        raise bad_request(f"dimensions: this model's vectors have {size}, got {dimensions}", "dimensions")


def _cut(values: list[float], dimensions: int | None) -> list[float]:
    if dimensions is None or dimensions == len(values):
        return values
    kept = values[:dimensions]
    norm = math.sqrt(sum(value * value for value in kept)) or 1.0
    return [value / norm for value in kept]


def _encoded(values: list[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return values
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
