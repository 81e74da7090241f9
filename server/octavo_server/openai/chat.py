"""`POST /v1/chat/completions`: answers to a conversation, whole or streamed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo_engine.sampling_params import SamplingParams
from octavo_server.caller import Caller, caller_of
from octavo_server.errors import bad_request
from octavo_server.event_stream import EventStream, guarded
from octavo_server.generation import DeltaStream
from octavo_server.json_response import JsonResponse
from octavo_server.openai.beam_options import REFUSED_BESIDE_BEAMS, beam_length_penalty
from octavo_server.openai.chat_answer import ChatAnswer
from octavo_server.openai.chat_rendering import ChatRenderer, chat_events
from octavo_server.openai.constraints import (
    Constraint,
    check_tools,
    requested_constraint,
    tool_choice_constraint,
)
from octavo_server.openai.messages import render_chat
from octavo_server.openai.refused_fields import HINTS
from octavo_server.openai.request_types import ChatCompletionRequest
from octavo_server.openai.resume import can_resume, check_resume, resume_headers, seed_of, tells_tokens
from octavo_server.openai.sampling import sampling_params
from octavo_server.openai.sequences import (
    Prompt,
    ResponseIdentity,
    UsageCounter,
    check_stream_options,
    sequence_requests,
    truncate,
)
from octavo_server.parsers.answer import AnswerParser
from octavo_server.parsers.choose import prompt_opens_thoughts
from octavo_server.parsers.harmony import ASSISTANT, CALL_END, HarmonyParser, opened_message
from octavo_server.parsers.reasoning import ThinkParser
from octavo_server.parsing import Refused, parse
from octavo_server.replica import Replica
from octavo_server.served_model import ServedModel

_REFUSED = {
    **REFUSED_BESIDE_BEAMS,
    "echo": Refused("only /v1/completions can echo the prompt"),
    "best_of": Refused("use n"),
}


@dataclass(frozen=True, slots=True)
class ChatRun:
    """A chat under way: its sequences run, its answers are still empty."""

    deltas: DeltaStream
    answers: list[ChatAnswer]
    usage: UsageCounter
    identity: ResponseIdentity
    prompt: Prompt


def router(replica: Replica) -> APIRouter:
    """The chat route."""
    routes = APIRouter(tags=["generate"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        """Answer a conversation."""
        parsed = parse(await http.body(), ChatCompletionRequest, _REFUSED, HINTS)
        replica.metrics.ignored_fields(len(parsed.unknown_fields))
        request = parsed.request
        options = check_stream_options(request)
        log_fields = http.scope["state"].setdefault("log_fields", {})
        caller = caller_of(http)
        run = await start_chat(replica, request, caller, log_fields)
        tells = tells_tokens(request, caller, len(run.answers)) or bool(request.return_token_ids)
        renderer = ChatRenderer(replica.served.tokenizer, request, run.identity, run.prompt, tells)
        if request.stream:
            events = guarded(
                chat_events(run.deltas, renderer, run.answers, run.usage, options),
                request_id=run.identity.id,
                on_error=lambda error: replica.metrics.rejected(error.reason),
            )
            headers = resume_headers(request, caller, len(run.answers), len(run.prompt.token_ids))
            return EventStream(events, source=run.deltas, headers=headers)
        async with contextlib.aclosing(run.deltas):
            async for delta in run.deltas:
                run.usage.add(delta)
                run.answers[delta.index].push(delta)
        return JsonResponse(renderer.completion(run.answers, run.usage))

    return routes


async def start_chat(
    replica: Replica,
    request: ChatCompletionRequest,
    caller: Caller,
    log_fields: dict[str, Any],
    prefix: str = "chatcmpl",
) -> ChatRun:
    """Check, render, tokenize and begin; raises `ApiError`. Whoever calls closes `deltas`."""
    served = replica.served
    model = served.check_name(request.model)
    log_fields["model"] = model
    served.require_task("generate", "/v1/chat/completions")
    names = _check_options(request, served)
    n = request.n or 1
    length_penalty = beam_length_penalty(request)
    check_resume(request, n)
    constraint = requested_constraint(request)
    if request.tools and names:
        by_choice = tool_choice_constraint(request.tool_choice, request.tools, served.tool_parser)
        if by_choice is not None and constraint is not None:
            raise bad_request(f"{constraint.param}: cannot be combined with tool_choice", constraint.param)
        constraint = constraint or by_choice
    prompt, rendered = await replica.prepare(prepare, served, request, constraint)
    identity = ResponseIdentity.new(prefix, served, model, request)
    usage = UsageCounter([prompt], n, log_fields)
    sequences = sequence_requests(
        [prompt], n, identity, request, caller, constraint, adapter=served.adapter_of(model),
        seed=seed_of(identity.id) if can_resume(request, n) else None,
    )  # fmt: skip
    if length_penalty is None:
        deltas = await replica.generator.start(sequences)
    else:
        deltas = await replica.beams.start(sequences, n, length_penalty)
    answers = [
        ChatAnswer(
            _answer_parser(served, request, names, rendered),
            shows_reasoning=request.include_reasoning is not False,
        )
        for _ in range(n)
    ]
    return ChatRun(deltas, answers, usage, identity, prompt)


def _check_options(request: ChatCompletionRequest, served: ServedModel) -> list[str]:
    """The names of the tools the model may call."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs: only allowed when logprobs is true", "top_logprobs")
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs: cannot be streamed", "prompt_logprobs")
    if request.tool_choice not in (None, "none") and not request.tools:
        raise bad_request("tool_choice: only allowed when tools are given", "tool_choice")
    if not request.tools:
        return []
    if isinstance(request.tool_choice, str) and request.tool_choice not in ("none", "auto", "required"):
        raise bad_request("tool_choice: must be none, auto, required or name a function", "tool_choice")
    names = check_tools(request.tools)
    if request.tool_choice == "none":
        return []
    if served.tool_parser is None:
        raise bad_request(
            "tools: this model's chat template does not know tools; whoever runs the server can set --tool-call-parser",
            "tools",
        )
    return names


def _answer_parser(
    served: ServedModel, request: ChatCompletionRequest, names: list[str], rendered: str
) -> AnswerParser:
    max_calls = 1 if request.parallel_tool_calls is False else None
    if served.speaks_harmony:
        return AnswerParser(HarmonyParser(names, opened_message(rendered)), max_calls=max_calls)
    reasoning = ThinkParser(starts_thinking=prompt_opens_thoughts(rendered)) if served.thinks else None
    tools = served.tool_parser(names) if names and served.tool_parser is not None else None
    return AnswerParser(reasoning, tools, max_calls=max_calls)


def prepare(served: ServedModel, request: ChatCompletionRequest, constraint: Constraint | None) -> tuple[Prompt, str]:
    """Render the template, tokenize, check against the context; also the rendered text, whose end the answer goes on.

    Call off the event loop.
    """
    adds_prompt = request.add_generation_prompt
    text = render_chat(
        served,
        request.messages,
        tools=None if request.tool_choice == "none" else request.tools,
        add_generation_prompt=not request.continue_final_message if adds_prompt is None else adds_prompt,
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=_template_kwargs(request),
    )
    if served.speaks_harmony and constraint is not None and text.endswith(ASSISTANT):
        text += constraint.harmony_opening
    # Templates write the special tokens themselves.
    ids = served.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    asked = request.max_completion_tokens or request.max_tokens
    max_param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    ids = truncate(ids, request, served.info.max_model_len - (asked or 1))
    budget = served.token_budget(len(ids), asked, prompt_param="messages", max_param=max_param)
    sampling = sampling_params(
        request,
        served,
        max_tokens=budget,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        structured=None if constraint is None else constraint.structured,
    )
    return Prompt(ids, _with_channels(sampling, served) if served.speaks_harmony else sampling), text


def _with_channels(sampling: SamplingParams, served: ServedModel) -> SamplingParams:
    """The parser needs the tags, which are special tokens; a call ends the turn, also where no checkpoint says so."""
    ending = served.tokenizer.encode(CALL_END, add_special_tokens=False)
    stops = sampling.stop_token_ids
    if len(ending) == 1 and ending[0] not in (*served.info.eos_token_ids, *stops):
        stops = (*stops, *ending)
    return msgspec.structs.replace(sampling, skip_special_tokens=False, stop_token_ids=stops)


def _template_kwargs(request: ChatCompletionRequest) -> dict[str, Any]:
    values: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if request.documents is not None:
        values["documents"] = request.documents
    if request.reasoning_effort is not None:
        values.setdefault("reasoning_effort", request.reasoning_effort)
        if request.reasoning_effort == "none":
            values.setdefault("enable_thinking", False)
    return values
