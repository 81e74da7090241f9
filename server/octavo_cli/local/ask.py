"""One question to a running service, its answer streamed to the terminal as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

MAX_ANSWER_TOKENS = 256
ANSWER_TIMEOUT_S = 600.0
IDLE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back. `tokens` counts generated tokens; times are seconds from sending."""

    text: str
    tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Decode rate after the first token."""
        spent = self.total_s - self.first_token_s
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else 0.0


class AskError(Exception):
    """The service did not answer; the message says what it said instead."""


async def ask(base_url: str, model: str, question: str, on_text: Callable[[str], None]) -> Answer:
    """Stream a greedy chat completion of `question` through the OpenAI API at `base_url`.

    Raises `AskError` when the service refuses, breaks off or stays silent.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, sock_read=IDLE_TIMEOUT_S)
    started = time.monotonic()
    pieces: list[str] = []
    tokens, first = 0, 0.0
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.post(f"{base_url}/v1/chat/completions", json=body) as response,
        ):
            if response.status != 200:
                raise AskError(f"{response.status}: {_message(await response.text())}")
            async for line in response.content:
                event = _event(line)
                if event is None:
                    continue
                if "error" in event:
                    raise AskError(_message(json.dumps(event)))
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                if text:
                    first = first or time.monotonic() - started
                    pieces.append(text)
                    on_text(text)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise AskError(f"the connection failed: {error or type(error).__name__}") from error
    return Answer("".join(pieces), tokens, first, time.monotonic() - started)


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON of an SSE data line; None for blank lines, comments and the closing `[DONE]`."""
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if data == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    return event


def _message(body: str) -> str:
    """The message of an OpenAI error body, or the body's beginning when it is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300]
