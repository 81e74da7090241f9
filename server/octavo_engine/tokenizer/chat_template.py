"""Chat messages to prompt text, with the template the model was trained on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from octavo_engine.errors import InvalidRequestError
from octavo_engine.tokenizer.sandbox import Budget, ChatEnvironment, TemplateRefusalError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_COMPILED = 32
RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message"))
LOOKS_INTO_CONTENT = re.compile(
    r"in\s+[\w.\[\]'\"]*(\.content|\[['\"]content['\"]\])|(\.content|\[['\"]content['\"]\]|\bcontent)\s+is\s+(not\s+)?"
    r"(string|iterable|sequence|mapping)"
)


class ChatTemplates:
    """A model's named templates (`default`, `tool_use`, ...), compiled when first used. Thread-safe."""

    def __init__(self, named: Mapping[str, str]) -> None:
        self._named = dict(named)
        self._environment = ChatEnvironment()
        self._compiled: dict[str, jinja2.Template] = {}
        self._lock = threading.Lock()

    @property
    def default(self) -> str | None:
        """The template for chats without tools."""
        return self._named.get("default") or next(iter(self._named.values()), None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt; raises `InvalidRequestError` naming the field at fault."""
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message: cannot be combined with add_generation_prompt", "continue_final_message"
            )
        source = chat_template or (self._named.get("tool_use") if tools else None) or self.default
        if source is None:
            raise InvalidRequestError(
                "messages: this model has no chat template; use /v1/completions, or start the server with one",
                "messages",
            )
        reserved = sorted(RESERVED & variables.keys())
        if reserved:
            raise InvalidRequestError(f"chat_template_kwargs: {reserved[0]!r} cannot be set", "chat_template_kwargs")
        shaped = [_shaped(message, index, source) for index, message in enumerate(messages)]
        text = self._run(
            self._compile(source),
            {
                **variables,
                "messages": shaped,
                "tools": [dict(tool) for tool in tools] if tools else None,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
            },
        )
        return _cut_after_final_message(text, shaped) if continue_final_message else text

    def _compile(self, source: str) -> jinja2.Template:
        with self._lock:
            compiled = self._compiled.get(source)
            if compiled is None:
                if len(source) > MAX_TEMPLATE_CHARS:
                    raise InvalidRequestError(
                        f"chat_template: longer than {MAX_TEMPLATE_CHARS} characters", "chat_template"
                    )
                try:
                    compiled = self._environment.from_string(source)
                except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
                    raise InvalidRequestError(f"chat_template: cannot be compiled: {error}", "chat_template") from error
                while len(self._compiled) >= MAX_COMPILED:
                    self._compiled.pop(next(iter(self._compiled)))
                self._compiled[source] = compiled
            return compiled

    def _run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        try:
            return self._environment.render_bounded(template, variables, Budget())
        except TemplateRefusalError as error:
            raise InvalidRequestError(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:
            raise InvalidRequestError(
                f"messages: the chat template failed on them: {type(error).__name__}: {str(error)[:500]}", "messages"
            ) from error


def _shaped(message: Mapping[str, Any], index: int, source: str) -> dict[str, Any]:
    """A message as templates expect it: text content as a string, arguments of tool calls as an object."""
    shaped = dict(message)
    content = shaped.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str) and not LOOKS_INTO_CONTENT.search(source):
        shaped["content"] = _joined_text(content, index)
    if shaped.get("tool_calls"):
        shaped["tool_calls"] = [
            _with_parsed_arguments(call, f"messages[{index}].tool_calls[{position}]")
            for position, call in enumerate(shaped["tool_calls"])
        ]
    return shaped


def _joined_text(parts: Sequence[Any], index: int) -> str:
    texts = []
    for position, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            field = f"messages[{index}].content[{position}]"
            raise InvalidRequestError(f"{field}: this model takes text parts only", field)
        texts.append(text)
    return "\n".join(texts)


def _with_parsed_arguments(call: Any, field: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field}.function.arguments: not valid JSON: {error}", field) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _cut_after_final_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Drop what the template writes after the last message, so that the model goes on with it."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = next((part.get("text") for part in reversed(content) if isinstance(part, Mapping)), None)
    if not isinstance(content, str) or not content.strip():
        raise InvalidRequestError("continue_final_message: the last message has no text to go on with", "messages")
    start = text.rfind(content.strip())
    if start < 0:
        raise InvalidRequestError("continue_final_message: the template changes the last message's text", "messages")
    whole = text.startswith(content.lstrip(), start)
    return text[: start + len(content.lstrip() if whole else content.strip())]
