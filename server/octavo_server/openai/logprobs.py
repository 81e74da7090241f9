"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo_engine.messages import TokenLogprobs
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.openai.response_types import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

LOWEST_LOGPROB = -9_999.0  # JSON has no infinity


def chat_logprobs(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, num_top: int, *, as_ids: bool = False
) -> ChatLogprobs:
    """One entry per token with its `num_top` best alternatives."""
    content = []
    for entry in entries:
        token, data = _shown(entry.token_id, tokenizer, as_ids)
        top = [
            TopLogprob(*_shown_with(token_id, logprob, tokenizer, as_ids)) for token_id, logprob in entry.top[:num_top]
        ]
        content.append(TokenLogprob(token, _finite(entry.logprob), data, top))
    return ChatLogprobs(content)


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    num_top: int,
    *,
    first_offset: int = 0,
    as_ids: bool = False,
) -> CompletionLogprobs:
    """Parallel lists; `None` stands for the first prompt token, which has no probability.

    `first_offset` is where in the choice's text the first of these tokens begins.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    offset = first_offset
    for entry, token_id in zip(entries, token_ids, strict=True):
        token, _ = _shown(token_id, tokenizer, as_ids)
        tokens.append(token)
        offsets.append(offset)
        offset += len(tokenizer.token_bytes(token_id).decode(errors="ignore"))
        token_logprobs.append(None if entry is None else _finite(entry.logprob))
        tops.append(None if entry is None else _top_mapping(entry, tokenizer, num_top, as_ids))
    return CompletionLogprobs(tokens, token_logprobs, tops if num_top else None, offsets)


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: per position a mapping of token id to logprob, rank and decoded token."""
    result: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        position: dict[str, Any] = {}
        for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1):
            position[str(token_id)] = _described(token_id, logprob, rank, tokenizer)
        position[str(entry.token_id)] = _described(entry.token_id, entry.logprob, entry.rank, tokenizer)
        result.append(position)
    return result


def _described(token_id: int, logprob: float, rank: int, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}


def _top_mapping(entry: TokenLogprobs, tokenizer: Tokenizer, num_top: int, as_ids: bool) -> dict[str, float]:
    """The best alternatives, and the chosen token when it is not among them."""
    mapping = {_shown(token_id, tokenizer, as_ids)[0]: _finite(value) for token_id, value in entry.top[:num_top]}
    mapping.setdefault(_shown(entry.token_id, tokenizer, as_ids)[0], _finite(entry.logprob))
    return mapping


def _shown(token_id: int, tokenizer: Tokenizer, as_ids: bool) -> tuple[str, list[int]]:
    text = f"token_id:{token_id}" if as_ids else tokenizer.token_text(token_id)
    return text, list(tokenizer.token_bytes(token_id))


def _shown_with(token_id: int, logprob: float, tokenizer: Tokenizer, as_ids: bool) -> tuple[str, float, list[int]]:
    text, data = _shown(token_id, tokenizer, as_ids)
    return text, _finite(logprob), data


def _finite(value: float) -> float:
    return max(value, LOWEST_LOGPROB)
