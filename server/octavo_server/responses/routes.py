"""`POST /v1/responses`, whole or as a stream of typed events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.caller import caller_of
from octavo_server.errors import ApiError, bad_request
from octavo_server.event_stream import EventStream
from octavo_server.json_response import JsonResponse
from octavo_server.openai.chat import ChatRun, start_chat
from octavo_server.openai.refused_fields import HINTS
from octavo_server.openai.response_types import Usage
from octavo_server.parsing import parse
from octavo_server.replica import Replica
from octavo_server.responses.output import JsonEvent, OutputBuilder
from octavo_server.responses.request import REFUSED_FIELDS, ResponsesRequest, as_chat


def router(replica: Replica) -> APIRouter:
    """Create a response; none can be fetched later because none is kept."""
    routes = APIRouter(tags=["generate"])

    @routes.post("/v1/responses")
    async def create(http: Request) -> Response:
        """Answer a conversation in items."""
        parsed = parse(await http.body(), ResponsesRequest, REFUSED_FIELDS, HINTS)
        replica.metrics.ignored_fields(len(parsed.unknown_fields))
        request = parsed.request
        if request.top_logprobs:
            raise bad_request("top_logprobs: use /v1/chat/completions for log-probabilities", "top_logprobs")
        log_fields = http.scope["state"].setdefault("log_fields", {})
        run = await start_chat(replica, as_chat(request), caller_of(http), log_fields, prefix="resp")
        builder = OutputBuilder()
        if request.stream:
            return EventStream(_events(request, run, builder, replica), source=run.deltas)
        async with contextlib.aclosing(run.deltas):
            async for _ in _run(run, builder):
                continue
        return JsonResponse(_response(request, run, builder, _status(run)))

    return routes


async def _run(run: ChatRun, builder: OutputBuilder) -> AsyncGenerator[JsonEvent, None]:
    """Every event of the output."""
    (answer,) = run.answers
    async for delta in run.deltas:
        run.usage.add(delta)
        for event in builder.push(answer.push(delta)):
            yield event
    for event in builder.finish(_status(run)):
        yield event


async def _events(
    request: ResponsesRequest, run: ChatRun, builder: OutputBuilder, replica: Replica
) -> AsyncGenerator[bytes, None]:
    number = 0

    def encode(event: JsonEvent) -> bytes:
        nonlocal number
        data = msgspec.json.encode({**event, "sequence_number": number})
        number += 1
        kind: str = event["type"]
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    for kind in ("response.created", "response.in_progress"):
        yield encode({"type": kind, "response": _response(request, run, builder, "in_progress")})
    try:
        async for event in _run(run, builder):
            yield encode(event)
    except ApiError as error:
        replica.metrics.rejected(error.reason)
        failed = _response(request, run, builder, "failed")
        failed["error"] = {"code": "server_error", "message": error.message}
        yield encode({"type": "response.failed", "response": failed})
        return
    status = _status(run)
    yield encode({"type": f"response.{status}", "response": _response(request, run, builder, status)})


def _status(run: ChatRun) -> str:
    return "incomplete" if run.answers[0].finish_reason in ("length", "abort") else "completed"


def _response(request: ResponsesRequest, run: ChatRun, builder: OutputBuilder, status: str) -> dict[str, Any]:
    ended = status in ("completed", "incomplete")
    return {
        "id": run.identity.id,
        "object": "response",
        "created_at": run.identity.created,
        "status": status,
        "model": run.identity.model,
        "output": list(builder.items),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "metadata": request.metadata or {},
        "max_output_tokens": request.max_output_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "text": {"format": {"type": "text"}} if request.text is None else msgspec.to_builtins(request.text),
        "reasoning": None if request.reasoning is None else msgspec.to_builtins(request.reasoning),
        "store": False,
        "truncation": "disabled",
        "usage": _usage(run.usage.usage(), run.answers[0].num_reasoning_tokens) if ended else None,
    }


def _usage(usage: Usage, num_reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
