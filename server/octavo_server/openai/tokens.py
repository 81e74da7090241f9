"""`/tokenize` and `/detokenize`, as vLLM offers them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.errors import bad_request
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai.messages import render_chat
from octavo_server.openai.request_types import JsonObject, ModelName, TokenId
from octavo_server.parsing import parse
from octavo_server.replica import Replica
from octavo_server.served_model import ServedModel


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """Either `prompt` or `messages`."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[JsonObject], Meta(min_length=1, max_length=LIMITS.messages)] | None = None
    tools: Annotated[list[JsonObject], Meta(max_length=LIMITS.tools)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[JsonObject, Meta(max_length=LIMITS.template_kwargs)] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Struct, frozen=True, kw_only=True):
    """Token ids of a text and, if wanted, how each is written."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """Token ids to turn into text."""

    tokens: Annotated[list[TokenId], Meta(max_length=LIMITS.detokenize_tokens)]
    model: ModelName | None = None


class DetokenizeResponse(Struct, frozen=True, kw_only=True):
    """The text."""

    prompt: str


def router(replica: Replica) -> APIRouter:
    """Text to ids and back."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        """Tokenize a prompt or a chat."""
        served = replica.served
        request = parse(await http.body(), TokenizeRequest).request
        served.check_name(request.model)
        return JsonResponse(await replica.text.run(_tokenize, served, request))

    @routes.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        """Turn token ids into text."""
        served = replica.served
        request = parse(await http.body(), DetokenizeRequest).request
        served.check_name(request.model)
        check_token_ids(request.tokens, served, "tokens")
        text = await replica.text.run(served.tokenizer.decode, request.tokens, skip_special_tokens=False)
        return JsonResponse(DetokenizeResponse(prompt=text))

    return routes


def check_token_ids(token_ids: list[int], served: ServedModel, param: str) -> None:
    """Raise a 400 for an id outside the vocabulary."""
    size = served.info.vocab_size
    if token_ids and max(token_ids) >= size:
        raise bad_request(f"{param}: {max(token_ids)} is no token of this model (vocabulary of {size})", param)


def _tokenize(served: ServedModel, request: TokenizeRequest) -> TokenizeResponse:
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("prompt: give either prompt or messages", "prompt")
    if request.prompt is not None:
        ids = served.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    else:
        text = render_chat(
            served,
            request.messages or [],
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            template_kwargs=request.chat_template_kwargs,
        )
        ids = served.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    return TokenizeResponse(
        count=len(ids),
        max_model_len=served.info.max_model_len,
        tokens=ids,
        token_strs=[served.tokenizer.token_text(i) for i in ids] if request.return_token_strs else None,
    )
