"""What chat and completions share: from a checked prompt to sequences, and from deltas to usage."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from octavo_engine.messages import FinishReason, TokenLogprobs
from octavo_engine.sampling_params import SamplingParams
from octavo_server.caller import Caller
from octavo_server.errors import bad_request
from octavo_server.generation import Delta, DeltaStream, SequenceRequest
from octavo_server.limits import LIMITS
from octavo_server.openai.constraints import Constraint
from octavo_server.openai.request_types import SamplingFields, StreamOptions
from octavo_server.openai.response_types import CompletionTokensDetails, PromptTokensDetails, Usage
from octavo_server.served_model import ServedModel


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt's tokens and how its sequences are sampled."""

    token_ids: list[int]
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class ResponseIdentity:
    """The fields every chunk of one response repeats. engine_key: unique, also where callers choose equal ids."""

    id: str
    model: str
    fingerprint: str
    created: int
    engine_key: str

    @classmethod
    def new(cls, prefix: str, served: ServedModel, model: str, fields: SamplingFields) -> ResponseIdentity:
        """The caller may choose a part of the id; a resumed answer keeps its own."""
        unique = uuid.uuid4().hex
        key = f"{prefix}-{unique}"
        resume, chosen = fields.octavo_resume, fields.request_id
        if resume is not None:
            return cls(resume.id, model, served.fingerprint, resume.created, key)
        return cls(f"{prefix}-{chosen}" if chosen else key, model, served.fingerprint, int(time.time()), key)


def sequence_requests(
    prompts: Sequence[Prompt],
    n: int,
    identity: ResponseIdentity,
    fields: SamplingFields,
    caller: Caller,
    constraint: Constraint | None,
    *,
    adapter: str = "",
    continues_prompt: bool = False,
    seed: int | None = None,
) -> list[SequenceRequest]:
    """`n` sequences for each prompt, in response order; sibling seeds differ so that siblings differ.

    `seed` is for requests that give none.
    """
    if len(prompts) * n > LIMITS.sequences:
        raise bad_request(f"n: {len(prompts)} prompts times {n} exceed {LIMITS.sequences} sequences", "n")
    priority = caller.priority if caller.priority is not None else fields.priority or 0
    salt = caller.cache_salt(fields.cache_salt)
    requests = []
    for position, prompt in enumerate(prompts):
        for sibling in range(n):
            sampling = prompt.sampling
            if sampling.seed is None and seed is not None:
                sampling = msgspec.structs.replace(sampling, seed=seed)
            if sampling.seed is not None and sibling:
                sampling = msgspec.structs.replace(sampling, seed=sampling.seed + sibling)
            index = position * n + sibling
            requests.append(
                SequenceRequest(
                    index=index,
                    request_id=f"{identity.engine_key}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=sampling,
                    caller=caller,
                    cache_salt=salt,
                    priority=priority,
                    adapter=adapter,
                    continues_prompt=continues_prompt,
                    shares_prompt=sibling > 0,
                    resumed_token_ids=() if fields.octavo_resume is None else tuple(fields.octavo_resume.token_ids),
                    operation="text_completion" if continues_prompt else "chat",
                    structured_param="" if constraint is None else constraint.param,
                )
            )
    return requests


def truncate(token_ids: list[int], fields: SamplingFields, room: int) -> list[int]:
    """As many tokens as `truncate_prompt_tokens` says: -1 for all that the context has room for, None for all.

    `truncation_side` says where tokens are cut off; the beginning, if nothing is said.
    """
    keep = fields.truncate_prompt_tokens
    if keep is None:
        if fields.truncation_side is not None:
            raise bad_request("truncation_side: only allowed with truncate_prompt_tokens", "truncation_side")
        return token_ids
    wanted = room if keep == -1 else keep
    if wanted <= 0:
        return []
    return token_ids[:wanted] if fields.truncation_side == "right" else token_ids[-wanted:]


class SequenceText:
    """One sequence collected into a whole."""

    __slots__ = ("finish_reason", "logprobs", "parts", "prompt_logprobs", "stop_reason", "token_ids")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.finish_reason = FinishReason.STOP
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, delta: Delta) -> None:
        self.parts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


async def collect(deltas: DeltaStream, count: int, usage: UsageCounter) -> list[SequenceText]:
    """Run `count` sequences to their ends."""
    texts = [SequenceText() for _ in range(count)]
    async for delta in deltas:
        usage.add(delta)
        texts[delta.index].add(delta)
    return texts


class UntoldTokens:
    """Tokens of deltas that show nothing yet: the next chunk that is sent tells them too."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def hold(self, delta: Delta) -> None:
        self._held += delta.token_ids

    def join(self, delta: Delta) -> Delta:
        """The delta with all tokens since the last chunk. Only for answers of one sequence, or with nothing held."""
        if not self._held or delta.logprobs:
            return delta
        held, self._held = self._held, []
        return dataclasses.replace(delta, token_ids=[*held, *delta.token_ids])


class UsageCounter:
    """Counts a response's tokens: each prompt once, every generated token, and what the prefix cache saved."""

    def __init__(self, prompts: Sequence[Prompt], n: int, log_fields: dict[str, Any]) -> None:
        self._n = n
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._cached_tokens = [0] * len(prompts)
        self._completion_tokens = 0
        self._log_fields = log_fields
        log_fields["prompt_tokens"] = self._prompt_tokens

    def add(self, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        if delta.num_cached_tokens and delta.index % self._n == 0:
            self._cached_tokens[delta.index // self._n] = delta.num_cached_tokens
        if delta.finish_reason is not None:
            self._log_fields["completion_tokens"] = self._completion_tokens
            self._log_fields["cached_tokens"] = sum(self._cached_tokens)
            self._log_fields["finish_reason"] = delta.finish_reason.value

    def usage(self, num_reasoning_tokens: int = 0) -> Usage:
        """Usage so far."""
        return Usage(
            self._prompt_tokens,
            self._completion_tokens,
            self._prompt_tokens + self._completion_tokens,
            PromptTokensDetails(sum(self._cached_tokens)),
            CompletionTokensDetails(num_reasoning_tokens) if num_reasoning_tokens else UNSET,
        )


async def at_intervals(deltas: DeltaStream, interval: int | None) -> AsyncGenerator[Delta, None]:
    """The deltas joined until each holds `interval` tokens, but for the last of a sequence; None joins none."""
    held: dict[int, Delta] = {}
    async for delta in deltas:
        before = held.pop(delta.index, None)
        joined = delta if before is None else _joined(before, delta)
        if joined.finish_reason is None and len(joined.token_ids) < (interval or 1):
            held[joined.index] = joined
        else:
            yield joined


def _joined(first: Delta, second: Delta) -> Delta:
    return dataclasses.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=[*(first.logprobs or []), *(second.logprobs or [])] or None,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
    )


def check_stream_options(fields: SamplingFields) -> StreamOptions:
    """The stream's options; raises a 400 when they are given without `stream`."""
    if not fields.stream:
        for name in ("stream_options", "stream_interval"):
            if getattr(fields, name) is not None:
                raise bad_request(f"{name}: only allowed when stream is true", name)
    return fields.stream_options or StreamOptions()
