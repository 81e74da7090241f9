"""One chat answer as it grows: text, thoughts and tool calls told apart."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from msgspec import UNSET

from octavo_engine.messages import FinishReason, TokenLogprobs
from octavo_server.generation import Delta
from octavo_server.openai.response_types import (
    ChatDelta,
    ChatMessage,
    FunctionCall,
    ToolCall,
    ToolCallDelta,
)
from octavo_server.parsers.answer import AnswerParser
from octavo_server.parsers.events import Call, Content, Event, Reasoning


class ChatAnswer:
    """Collects one sequence; `push` also tells what a stream should show of a delta."""

    def __init__(self, parser: AnswerParser, *, shows_reasoning: bool) -> None:
        self._parser = parser
        self._shows_reasoning = shows_reasoning
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_reasoning_tokens = 0

    def push(self, delta: Delta) -> ChatDelta:
        """Take a delta; an empty result need not be sent."""
        if self._parser.thinking:
            self.num_reasoning_tokens += len(delta.token_ids)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        shown = self._take(self._parser.push(delta.text, delta.finish_reason is not None))
        if delta.finish_reason is not None:
            called = self._calls and delta.finish_reason is FinishReason.STOP
            self.finish_reason = "tool_calls" if called else delta.finish_reason.value
            self.stop_reason = delta.stop_reason
        return shown

    def message(self) -> ChatMessage:
        """The whole answer; content is null when there are only calls."""
        content = "".join(self._content)
        reasoning = "".join(self._reasoning)
        return ChatMessage(
            content=content if content or not self._calls else None,
            reasoning=reasoning or UNSET,
            reasoning_content=reasoning or UNSET,
            tool_calls=self._calls or UNSET,
        )

    def _take(self, events: Sequence[Event]) -> ChatDelta:
        content, reasoning = "", ""
        calls: list[ToolCallDelta] = []
        for event in events:
            match event:
                case Content(text):
                    content += text
                case Reasoning(text) if self._shows_reasoning:
                    reasoning += text
                case Call(name, arguments):
                    call = ToolCall(f"call_{uuid.uuid4().hex[:24]}", FunctionCall(name, arguments))
                    calls.append(ToolCallDelta(len(self._calls), call.function, call.id, call.type))
                    self._calls.append(call)
        self._content.append(content)
        self._reasoning.append(reasoning)
        return ChatDelta(
            content=content or UNSET,
            reasoning=reasoning or UNSET,
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
