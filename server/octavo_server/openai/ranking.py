"""`/score` and `/rerank`: how near texts are to each other, by a classifier of pairs or the cosine of their vectors."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.caller import Caller, caller_of
from octavo_server.errors import bad_request
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai import pooled
from octavo_server.parsing import Refused
from octavo_server.replica import Replica

Texts = Annotated[list[str], Meta(min_length=1, max_length=LIMITS.embed_inputs)]
_REFUSED = {**pooled.REFUSED, "mm_processor_kwargs": Refused("this server takes text only")}
_TASKS = ("embed", "classify")
Instruction = Annotated[str, Meta(max_length=LIMITS.identifier_chars * 16)] | None


class ScoreRequest(pooled.PooledRequest, frozen=True, kw_only=True):
    """One text against many, or many against as many; both pairs of names are in use."""

    queries: str | Texts | None = None
    documents: str | Texts | None = None
    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    instruction: Instruction = None


class Score(Struct, frozen=True):
    """One pair's score."""

    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreResponse(Struct, frozen=True, kw_only=True):
    """Scores in the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    usage: pooled.Usage


class RerankRequest(pooled.PooledRequest, frozen=True, kw_only=True):
    """Cohere's and Jina's shape."""

    query: str
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1, max_length=LIMITS.embed_inputs)]
    top_n: Annotated[int, Meta(ge=0, le=LIMITS.max_tokens)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Meta(ge=1, le=LIMITS.max_tokens)] | None = None
    instruction: Instruction = None


class Document(Struct, frozen=True):
    """A document's text."""

    text: str


class RankedDocument(Struct, frozen=True):
    """Where a document was in the request and how relevant it is."""

    index: int
    document: Document | None
    relevance_score: float


class RerankResponse(Struct, frozen=True, kw_only=True):
    """Documents, the most relevant first."""

    id: str
    model: str
    usage: pooled.Usage
    results: list[RankedDocument]


def router(replica: Replica) -> APIRouter:
    """Score and rerank under all the names in use."""
    routes = APIRouter(tags=["embed"])

    @routes.post("/v1/score")
    @routes.post("/score")
    async def score(http: Request) -> Response:
        """Score pairs of texts."""
        request, model = await pooled.read_request(http, replica, ScoreRequest, _REFUSED, _TASKS, "/score")
        first, second = _pairs(request)
        caller, truncate = caller_of(http), request.truncate_prompt_tokens
        pairs = [(first[index if len(first) > 1 else 0], text) for index, text in enumerate(second)]
        found = await _scores(replica, pairs, caller, ("queries", "documents"), truncate, request.instruction)
        data = [Score(index, value) for index, value in enumerate(found.values)]
        return JsonResponse(ScoreResponse(id=f"score-{uuid.uuid4().hex}", model=model, data=data, usage=found.usage))

    @routes.post("/rerank")
    @routes.post("/v1/rerank")
    @routes.post("/v2/rerank")
    async def rerank(http: Request) -> Response:
        """Sort documents by their relevance to a query."""
        request, model = await pooled.read_request(http, replica, RerankRequest, _REFUSED, _TASKS, "/rerank")
        texts = [_document(document, index) for index, document in enumerate(request.documents)]
        truncate = request.max_tokens_per_doc or request.truncate_prompt_tokens
        pairs = [(request.query, text) for text in texts]
        caller = caller_of(http)
        found = await _scores(replica, pairs, caller, ("query", "documents"), truncate, request.instruction)
        ranked = sorted(
            ((value, index) for index, value in enumerate(found.values)), key=lambda item: (-item[0], item[1])
        )
        shown = request.return_documents is not False
        results = [
            RankedDocument(index, Document(texts[index]) if shown else None, value)
            for value, index in ranked[: request.top_n or None]
        ]
        return JsonResponse(
            RerankResponse(id=f"rerank-{uuid.uuid4().hex}", model=model, usage=found.usage, results=results)
        )

    return routes


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """In [-1, 1]; 0 when one of them is zero."""
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    if norms == 0:
        return 0.0
    return max(-1.0, min(1.0, sum(x * y for x, y in zip(a, b, strict=True)) / norms))


@dataclass(frozen=True, slots=True)
class _Scores:
    """Of each pair, in order."""

    values: list[float]
    usage: pooled.Usage


async def _scores(
    replica: Replica,
    pairs: list[tuple[str, str]],
    caller: Caller,
    params: tuple[str, str],
    truncate: int | None,
    instruction: str | None,
) -> _Scores:
    """By the classifier's only label, or by the cosine of the vectors of both."""
    embedder = replica.embedder
    if replica.served.info.task == "classify":
        scored = await embedder.score_pairs(pairs, caller, param=params[1], truncate=truncate, instruction=instruction)
        return _Scores([item.values[0] for item in scored], pooled.usage_of(scored))
    if instruction is not None:
        raise bad_request("instruction: this model takes none", "instruction")
    queries = list(dict.fromkeys(query for query, _ in pairs))
    left = await embedder.embed_texts(queries, caller, param=params[0], truncate=truncate)
    right = await embedder.embed_texts([text for _, text in pairs], caller, param=params[1], truncate=truncate)
    vectors = dict(zip(queries, left, strict=True))
    values = [cosine(vectors[query].values, vector.values) for (query, _), vector in zip(pairs, right, strict=True)]
    return _Scores(values, pooled.usage_of([*left, *right]))


def _pairs(request: ScoreRequest) -> tuple[list[str], list[str]]:
    first = request.queries if request.queries is not None else request.text_1
    second = request.documents if request.documents is not None else request.text_2
    if first is None:
        raise bad_request("queries: missing; give queries and documents, or text_1 and text_2", "queries")
    if second is None:
        raise bad_request("documents: missing; give queries and documents, or text_1 and text_2", "documents")
    left = [first] if isinstance(first, str) else first
    right = [second] if isinstance(second, str) else second
    if len(left) not in (1, len(right)):
        raise bad_request(f"queries: must be one text or as many as documents ({len(right)})", "queries")
    return left, right


def _document(document: str | dict[str, Any], index: int) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise bad_request(f"documents[{index}].text: expected a string", f"documents[{index}].text")
    return text
