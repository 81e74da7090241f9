"""`/classify`: what a sequence classifier says of texts."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.caller import caller_of
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai import pooled
from octavo_server.openai.request_types import TokenId
from octavo_server.openai.texts import text_inputs
from octavo_server.parsing import Refused
from octavo_server.replica import Replica

_REFUSED = {**pooled.REFUSED, "messages": Refused("not supported; send texts in input")}


class ClassificationRequest(pooled.PooledRequest, frozen=True, kw_only=True):
    """Texts or token ids, as for embeddings."""

    input: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    add_special_tokens: bool | None = None


class Classification(Struct, frozen=True):
    """One text's most likely label, and the scores of all in the model's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationResponse(Struct, frozen=True, kw_only=True):
    """In the order of the texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: pooled.Usage


def router(replica: Replica) -> APIRouter:
    """The classify route under both names in use."""
    routes = APIRouter(tags=["embed"])

    @routes.post("/classify")
    @routes.post("/v1/classify")
    async def classify(http: Request) -> Response:
        """Tell which label fits each text."""
        request, model = await pooled.read_request(
            http, replica, ClassificationRequest, _REFUSED, "classify", "/classify"
        )
        found = await replica.embedder.embed_texts(
            text_inputs(request.input, "input", LIMITS.embed_inputs),
            caller_of(http),
            param="input",
            truncate=request.truncate_prompt_tokens,
            add_special_tokens=request.add_special_tokens is not False,
        )
        labels = replica.served.info.labels
        data = [
            Classification(index, labels[item.values.index(max(item.values))], item.values, len(labels))
            for index, item in enumerate(found)
        ]
        return JsonResponse(
            ClassificationResponse(
                id=f"classify-{uuid.uuid4().hex}",
                created=int(time.time()),
                model=model,
                data=data,
                usage=pooled.usage_of(found),
            )
        )

    return routes
