"""`POST /v1/completions`: plain text continuation, whole or streamed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from octavo_engine.messages import TokenLogprobs
from octavo_server.caller import caller_of
from octavo_server.errors import bad_request
from octavo_server.event_stream import EventStream, encode_event, guarded
from octavo_server.generation import Delta, DeltaStream
from octavo_server.json_response import JsonResponse
from octavo_server.limits import LIMITS
from octavo_server.openai.beam_options import REFUSED_BESIDE_BEAMS, beam_length_penalty
from octavo_server.openai.constraints import Constraint, requested_constraint
from octavo_server.openai.logprobs import completion_logprobs, prompt_logprobs
from octavo_server.openai.refused_fields import HINTS
from octavo_server.openai.request_types import CompletionRequest, StreamOptions
from octavo_server.openai.response_types import Completion, CompletionChoice, CompletionLogprobs
from octavo_server.openai.resume import can_resume, check_resume, resume_headers, seed_of, tells_tokens
from octavo_server.openai.sampling import sampling_params
from octavo_server.openai.sequences import (
    Prompt,
    ResponseIdentity,
    SequenceText,
    UntoldTokens,
    UsageCounter,
    at_intervals,
    check_stream_options,
    collect,
    sequence_requests,
    truncate,
)
from octavo_server.openai.texts import TextInput, text_inputs
from octavo_server.openai.tokens import check_token_ids
from octavo_server.parsing import parse
from octavo_server.replica import Replica
from octavo_server.served_model import ServedModel

DEFAULT_MAX_TOKENS = 16


def router(replica: Replica) -> APIRouter:
    """The completions route."""
    routes = APIRouter(tags=["generate"])

    @routes.post("/v1/completions")
    async def completions(http: Request) -> Response:
        """Continue one or more prompts."""
        served = replica.served
        parsed = parse(await http.body(), CompletionRequest, REFUSED_BESIDE_BEAMS, HINTS)
        replica.metrics.ignored_fields(len(parsed.unknown_fields))
        request = parsed.request
        model = served.check_name(request.model)
        served.require_task("generate", "/v1/completions")
        n, best_of = _check_options(request)
        length_penalty = beam_length_penalty(request)
        options = check_stream_options(request)
        caller = caller_of(http)
        check_resume(request, _num_prompts(request) * best_of)
        constraint = requested_constraint(request)
        prompts = await replica.prepare(_prepare, served, request, constraint)
        identity = ResponseIdentity.new("cmpl", served, model, request)
        log_fields = http.scope["state"].setdefault("log_fields", {"model": model})
        usage = UsageCounter(prompts, best_of, log_fields)
        num_sequences = len(prompts) * best_of
        tells = tells_tokens(request, caller, num_sequences)
        sequences = sequence_requests(
            prompts, best_of, identity, request, caller, constraint, adapter=served.adapter_of(model),
            continues_prompt=True, seed=seed_of(identity.id) if can_resume(request, num_sequences) else None,
        )  # fmt: skip
        if length_penalty is None:
            deltas = await replica.generator.start(sequences)
        else:
            deltas = await replica.beams.start(sequences, n, length_penalty)
        renderer = _Renderer(served, request, identity, prompts, best_of, tells or bool(request.return_token_ids))
        if request.stream:
            events = guarded(
                _events(deltas, renderer, usage, options),
                request_id=identity.id,
                on_error=lambda error: replica.metrics.rejected(error.reason),
            )
            headers = resume_headers(request, caller, num_sequences, len(prompts[0].token_ids))
            return EventStream(events, source=deltas, headers=headers)
        async with contextlib.aclosing(deltas):
            texts = await collect(deltas, len(sequences), usage)
        if best_of > n:
            texts = _best(texts, n, best_of)
        choices = [renderer.whole(index, index // n, text) for index, text in enumerate(texts)]
        return JsonResponse(renderer.completion(choices, usage=usage.usage()))

    return routes


def _check_options(request: CompletionRequest) -> tuple[int, int]:
    """(n, best_of)."""
    n = request.n or 1
    best_of = request.best_of or n
    if best_of < n:
        raise bad_request(f"best_of: must be at least n ({n}), got {best_of}", "best_of")
    if best_of > n and request.stream:
        raise bad_request("best_of: cannot be streamed; leave it out or set stream to false", "best_of")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens: must be at least 1 unless echo is true", "max_tokens")
    if request.echo and request.stream and request.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs: cannot be streamed", "prompt_logprobs")
    return n, best_of


def _prepare(served: ServedModel, request: CompletionRequest, constraint: Constraint | None) -> list[Prompt]:
    """Tokenize every prompt and check it against the context."""
    prompts = []
    wants_prompt_logprobs = request.echo and request.logprobs is not None
    shown = request.logprobs if wants_prompt_logprobs else request.prompt_logprobs
    asked = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    ranked = request.best_of is not None and request.best_of > (request.n or 1)
    for param, prompt in _prompts(request):
        if isinstance(prompt, str):
            served.check_characters(prompt, param)
            ids = served.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
        else:
            ids = prompt
            check_token_ids(ids, served, param)
        ids = truncate(ids, request, served.info.max_model_len - max(asked, 1))
        budget = served.token_budget(len(ids), max(asked, 1), prompt_param=param, max_param="max_tokens")
        sampling = sampling_params(
            request,
            served,
            max_tokens=budget,
            logprobs=request.logprobs if request.logprobs is not None or not ranked else 0,
            prompt_logprobs=shown,
            structured=None if constraint is None else constraint.structured,
        )
        prompts.append(Prompt(ids, sampling))
    return prompts


def _num_prompts(request: CompletionRequest) -> int:
    return len(_prompts(request))


def _prompts(request: CompletionRequest) -> list[tuple[str, TextInput]]:
    """Each prompt with the name of its field."""
    prompts = text_inputs(request.prompt, "prompt", LIMITS.prompts)
    single = isinstance(request.prompt, str) or isinstance(request.prompt[0], int)
    return [("prompt" if single else f"prompt[{i}]", prompt) for i, prompt in enumerate(prompts)]


def _best(texts: Sequence[SequenceText], n: int, best_of: int) -> list[SequenceText]:
    """The `n` sequences of each prompt with the highest mean log-probability."""

    def mean(text: SequenceText) -> float:
        return sum(entry.logprob for entry in text.logprobs) / max(1, len(text.logprobs))

    groups = [texts[start : start + best_of] for start in range(0, len(texts), best_of)]
    return [text for group in groups for text in sorted(group, key=mean, reverse=True)[:n]]


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Deltas and sequences in the shape of this route."""

    served: ServedModel
    request: CompletionRequest
    identity: ResponseIdentity
    prompts: Sequence[Prompt]
    n: int
    tells_token_ids: bool

    def completion(self, choices: list[CompletionChoice], **extra: Any) -> Completion:
        identity = self.identity
        return Completion(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.fingerprint,
            choices=choices,
            **extra,
        )

    def prompt_text(self, position: int) -> str:
        """What `echo` puts before the answer."""
        return self.served.tokenizer.decode(self.prompts[position].token_ids, skip_special_tokens=True)

    def whole(self, index: int, position: int, text: SequenceText) -> CompletionChoice:
        request = self.request
        prompt = self.prompts[position]
        generates = request.max_tokens != 0
        echoed = self.prompt_text(position) if request.echo else ""
        shown_prompt_logprobs = None
        if request.prompt_logprobs is not None and text.prompt_logprobs is not None:
            shown_prompt_logprobs = prompt_logprobs(
                text.prompt_logprobs, self.served.tokenizer, request.prompt_logprobs
            )
        return CompletionChoice(
            index,
            echoed + text.text if generates else echoed,
            self._logprobs(prompt, text, generates) if request.logprobs is not None else None,
            text.finish_reason.value if generates else "length",
            text.stop_reason,
            token_ids=text.token_ids if request.return_token_ids else UNSET,
            prompt_token_ids=prompt.token_ids if request.return_token_ids else UNSET,
            prompt_logprobs=UNSET if shown_prompt_logprobs is None else shown_prompt_logprobs,
        )

    def _logprobs(self, prompt: Prompt, text: SequenceText, generates: bool) -> CompletionLogprobs:
        entries: list[TokenLogprobs | None] = list(text.logprobs) if generates else []
        token_ids = text.token_ids if generates else []
        if self.request.echo:
            entries = [*(text.prompt_logprobs or [None] * len(prompt.token_ids)), *entries]
            token_ids = [*prompt.token_ids, *token_ids]
        return completion_logprobs(
            entries,
            token_ids,
            self.served.tokenizer,
            self.request.logprobs or 0,
            as_ids=bool(self.request.return_tokens_as_token_ids),
        )

    def piece(self, delta: Delta, offset: int) -> CompletionChoice:
        """One delta as a chunk's choice; `offset` is how many characters this choice has shown before."""
        logprobs = None
        if self.request.logprobs is not None and delta.logprobs:
            logprobs = completion_logprobs(
                delta.logprobs,
                delta.token_ids,
                self.served.tokenizer,
                self.request.logprobs,
                first_offset=offset,
                as_ids=bool(self.request.return_tokens_as_token_ids),
            )
        return CompletionChoice(
            delta.index,
            delta.text,
            logprobs,
            None if delta.finish_reason is None else delta.finish_reason.value,
            delta.stop_reason,
            token_ids=delta.token_ids if self.tells_token_ids else UNSET,
        )


async def _events(
    deltas: DeltaStream, renderer: _Renderer, usage: UsageCounter, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    request = renderer.request
    continuous = options.continuous_usage_stats and options.include_usage
    offsets = [0] * (len(renderer.prompts) * renderer.n)
    if request.echo:
        for index in range(len(offsets)):
            text = renderer.prompt_text(index // renderer.n)
            offsets[index] = len(text)
            yield encode_event(renderer.completion([CompletionChoice(index, text)]))
    untold = UntoldTokens()
    async for delta in at_intervals(deltas, request.stream_interval):
        usage.add(delta)
        if delta.replayed:
            offsets[delta.index] += len(delta.text)
            continue
        if request.max_tokens == 0:
            delta = Delta(delta.index, "", [], finish_reason=delta.finish_reason)
        if not delta.text and delta.finish_reason is None and not delta.logprobs and not request.return_token_ids:
            untold.hold(delta)
            continue
        delta = untold.join(delta)
        choice = renderer.piece(delta, offsets[delta.index])
        offsets[delta.index] += len(delta.text)
        yield encode_event(renderer.completion([choice], usage=usage.usage() if continuous else UNSET))
    if options.include_usage:
        yield encode_event(renderer.completion([], usage=usage.usage()))
