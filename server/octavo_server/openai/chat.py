"""`POST /v1/chat/completions`: answers to a conversation, whole or streamed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from octavo_server.caller import caller_of
from octavo_server.errors import bad_request
from octavo_server.event_stream import EventStream, encode_event, guarded
from octavo_server.generation import Delta, DeltaStream
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai.logprobs import chat_logprobs, prompt_logprobs
from octavo_server.openai.messages import render_chat
from octavo_server.openai.request_types import REFUSED_FIELDS, ChatCompletionRequest, StreamOptions
from octavo_server.openai.response_types import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
)
from octavo_server.openai.sampling import sampling_params
from octavo_server.openai.sequences import (
    Prompt,
    ResponseIdentity,
    SequenceText,
    UsageCounter,
    check_response_format,
    check_stream_options,
    collect,
    sequence_requests,
    truncate,
)
from octavo_server.parsing import parse
from octavo_server.replica import Replica
from octavo_server.served_model import ServedModel

_REFUSED = {**REFUSED_FIELDS, "echo": "only /v1/completions can echo the prompt", "best_of": "use n"}


def router(replica: Replica) -> APIRouter:
    """The chat route."""
    routes = APIRouter(tags=["generate"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        """Answer a conversation."""
        served = replica.served
        parsed = parse(await http.body(), ChatCompletionRequest, _REFUSED)
        replica.metrics.ignored_fields(len(parsed.unknown_fields))
        request = parsed.request
        model = served.check_name(request.model)
        served.require_task("generate", "/v1/chat/completions")
        _check_options(request)
        options = check_stream_options(request)
        caller = caller_of(http)
        prompt = await replica.text.run(prepare, served, request)
        identity = ResponseIdentity.new("chatcmpl", served, model)
        n = request.n or 1
        log_fields = http.scope["state"].setdefault("log_fields", {"model": model})
        usage = UsageCounter([prompt], n, log_fields)
        sequences = sequence_requests([prompt], n, identity, request, caller)
        deltas = await replica.generator.start(sequences)
        renderer = _Renderer(served, request, identity, prompt)
        if request.stream:
            events = guarded(
                _events(deltas, renderer, usage, options),
                request_id=identity.id,
                on_error=lambda error: replica.metrics.rejected(error.reason),
            )
            return EventStream(events, source=deltas)
        async with contextlib.aclosing(deltas):
            texts = await collect(deltas, n, usage)
        return JsonResponse(renderer.completion(texts, usage))

    return routes


def _check_options(request: ChatCompletionRequest) -> None:
    check_response_format(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs: only allowed when logprobs is true", "top_logprobs")
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs: cannot be streamed", "prompt_logprobs")
    if request.tools and request.tool_choice not in (None, "none", "auto"):
        raise bad_request("tool_choice: must be none or auto", "tool_choice")
    if request.tool_choice not in (None, "none") and not request.tools:
        raise bad_request("tool_choice: only allowed when tools are given", "tool_choice")


def prepare(served: ServedModel, request: ChatCompletionRequest) -> Prompt:
    """Render the template, tokenize, check against the context. Call off the event loop."""
    template_kwargs: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if request.documents is not None:
        template_kwargs["documents"] = request.documents
    if request.reasoning_effort is not None:
        template_kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    text = render_chat(
        served,
        request.messages,
        tools=None if request.tool_choice == "none" else request.tools,
        add_generation_prompt=(
            request.add_generation_prompt is not False
            if request.add_generation_prompt is not None
            else not request.continue_final_message
        ),
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=template_kwargs,
    )
    # Templates write the special tokens themselves.
    ids = served.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    asked = request.max_completion_tokens or request.max_tokens
    max_param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    ids = truncate(ids, request.truncate_prompt_tokens, served.info.max_model_len - (asked or 1))
    budget = served.token_budget(len(ids), asked, prompt_param="messages", max_param=max_param)
    sampling = sampling_params(
        request,
        served.tokenizer,
        max_tokens=budget,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        vocab_size=served.info.vocab_size,
    )
    return Prompt(ids, sampling)


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Deltas and sequences in the shape of this route."""

    served: ServedModel
    request: ChatCompletionRequest
    identity: ResponseIdentity
    prompt: Prompt

    def completion(self, texts: list[SequenceText], usage: UsageCounter) -> ChatCompletion:
        identity, request = self.identity, self.request
        first_prompt_logprobs = texts[0].prompt_logprobs
        return ChatCompletion(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.fingerprint,
            choices=[self._choice(index, text) for index, text in enumerate(texts)],
            usage=usage.usage(),
            prompt_logprobs=(
                prompt_logprobs(first_prompt_logprobs, self.served.tokenizer, request.prompt_logprobs)
                if first_prompt_logprobs is not None and request.prompt_logprobs is not None
                else UNSET
            ),
            prompt_token_ids=self.prompt.token_ids if request.return_token_ids else UNSET,
        )

    def _choice(self, index: int, text: SequenceText) -> ChatChoice:
        return ChatChoice(
            index,
            ChatMessage(text.text),
            text.finish_reason.value,
            (
                chat_logprobs(text.logprobs, self.served.tokenizer, self._num_top, as_ids=self._as_ids)
                if self.request.logprobs
                else None
            ),
            text.stop_reason,
            token_ids=text.token_ids if self.request.return_token_ids else UNSET,
        )

    def chunk(self, choices: list[ChatChunkChoice], **extra: Any) -> ChatCompletionChunk:
        identity = self.identity
        return ChatCompletionChunk(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.fingerprint,
            choices=choices,
            **extra,
        )

    def piece(self, delta: Delta) -> ChatChunkChoice:
        finished = delta.finish_reason is not None
        return ChatChunkChoice(
            delta.index,
            ChatDelta(content=delta.text if delta.text or not finished else UNSET),
            (
                chat_logprobs(delta.logprobs, self.served.tokenizer, self._num_top, as_ids=self._as_ids)
                if self.request.logprobs and delta.logprobs
                else None
            ),
            None if delta.finish_reason is None else delta.finish_reason.value,
            UNSET if delta.stop_reason is None else delta.stop_reason,
            token_ids=delta.token_ids if self.request.return_token_ids else UNSET,
        )

    @property
    def _num_top(self) -> int:
        return min(self.request.top_logprobs or 0, LIMITS.logprobs)

    @property
    def _as_ids(self) -> bool:
        return bool(self.request.return_tokens_as_token_ids)


async def _events(
    deltas: DeltaStream, renderer: _Renderer, usage: UsageCounter, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    request = renderer.request
    continuous = options.continuous_usage_stats and options.include_usage
    for index in range(request.n or 1):
        opening = ChatChunkChoice(index, ChatDelta(role="assistant", content=""))
        yield encode_event(renderer.chunk([opening], usage=usage.usage() if continuous else UNSET))
    async for delta in deltas:
        usage.add(delta)
        if not delta.text and delta.finish_reason is None and not delta.logprobs and not request.return_token_ids:
            continue
        yield encode_event(renderer.chunk([renderer.piece(delta)], usage=usage.usage() if continuous else UNSET))
    if options.include_usage:
        yield encode_event(renderer.chunk([], usage=usage.usage()))
