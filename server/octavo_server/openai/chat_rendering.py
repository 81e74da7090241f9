"""Chat answers in the shape of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from octavo_engine.messages import TokenLogprobs
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.event_stream import encode_event
from octavo_server.generation import Delta, DeltaStream
from octavo_server.openai.chat_answer import ChatAnswer
from octavo_server.openai.logprobs import chat_logprobs, prompt_logprobs
from octavo_server.openai.request_types import ChatCompletionRequest, StreamOptions
from octavo_server.openai.response_types import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
)
from octavo_server.openai.sequences import Prompt, ResponseIdentity, UntoldTokens, UsageCounter, at_intervals

_EMPTY = ChatDelta()


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders whole answers and chunks of one response."""

    tokenizer: Tokenizer
    request: ChatCompletionRequest
    identity: ResponseIdentity
    prompt: Prompt
    tells_token_ids: bool

    def completion(self, answers: Sequence[ChatAnswer], usage: UsageCounter) -> ChatCompletion:
        identity, request = self.identity, self.request
        shown = answers[0].prompt_logprobs
        return ChatCompletion(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.fingerprint,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=usage.usage(sum(answer.num_reasoning_tokens for answer in answers)),
            prompt_logprobs=(
                prompt_logprobs(shown, self.tokenizer, request.prompt_logprobs)
                if shown is not None and request.prompt_logprobs is not None
                else UNSET
            ),
            prompt_token_ids=self.prompt.token_ids if request.return_token_ids else UNSET,
        )

    def _choice(self, index: int, answer: ChatAnswer) -> ChatChoice:
        return ChatChoice(
            index,
            answer.message(),
            answer.finish_reason or "stop",
            self._logprobs(answer.logprobs),
            answer.stop_reason,
            token_ids=answer.token_ids if self.request.return_token_ids else UNSET,
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

    def piece(self, delta: Delta, shown: ChatDelta, answer: ChatAnswer) -> ChatChunkChoice:
        return ChatChunkChoice(
            delta.index,
            shown,
            self._logprobs(delta.logprobs) if delta.logprobs else None,
            answer.finish_reason,
            UNSET if delta.stop_reason is None else delta.stop_reason,
            token_ids=delta.token_ids if self.tells_token_ids else UNSET,
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return chat_logprobs(
            entries,
            self.tokenizer,
            self.request.top_logprobs or 0,
            as_ids=bool(self.request.return_tokens_as_token_ids),
        )


async def chat_events(
    deltas: DeltaStream,
    renderer: ChatRenderer,
    answers: Sequence[ChatAnswer],
    usage: UsageCounter,
    options: StreamOptions,
) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream: the role first, then what each delta shows, then usage when it is asked for."""
    wants_ids = bool(renderer.request.return_token_ids)
    untold = UntoldTokens()
    continuous = bool(options.continuous_usage_stats and options.include_usage)
    resumes = renderer.request.octavo_resume is not None
    for index in range(0 if resumes else len(answers)):
        opening = ChatChunkChoice(index, ChatDelta(role="assistant", content=""))
        yield encode_event(renderer.chunk([opening], usage=usage.usage() if continuous else UNSET))
    async for delta in at_intervals(deltas, renderer.request.stream_interval):
        usage.add(delta)
        answer = answers[delta.index]
        shown = answer.push(delta)
        if delta.replayed:
            continue
        if shown == _EMPTY and delta.finish_reason is None and not delta.logprobs and not wants_ids:
            untold.hold(delta)
            continue
        delta = untold.join(delta)
        choice = renderer.piece(delta, shown, answer)
        yield encode_event(renderer.chunk([choice], usage=usage.usage() if continuous else UNSET))
    if options.include_usage:
        total = usage.usage(sum(answer.num_reasoning_tokens for answer in answers))
        yield encode_event(renderer.chunk([], usage=total))
