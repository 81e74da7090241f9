"""One question to a running service, its answer streamed to the terminal as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo_cli.openai_client import EndpointError, open_session, stream_events

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


async def ask(base_url: str, model: str, question: str, on_text: Callable[[str], None]) -> Answer:
    """Stream a greedy chat completion of `question` through the OpenAI API at `base_url`.

    Raises `EndpointError` when the service refuses, breaks off or stays silent.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    pieces: list[str] = []
    tokens, first = 0, 0.0
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S), open_session(None, IDLE_TIMEOUT_S) as http:
            async for event in stream_events(http, f"{base_url}/v1/chat/completions", body):
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                if text:
                    first = first or time.monotonic() - started
                    pieces.append(text)
                    on_text(text)
    except TimeoutError as error:
        raise EndpointError(f"the answer was not complete after {ANSWER_TIMEOUT_S:g} s") from error
    return Answer("".join(pieces), tokens, first, time.monotonic() - started)
