"""Check chat messages and render them with the model's template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo_engine.errors import InvalidRequestError
from octavo_server.errors import bad_request, from_engine_error
from octavo_server.limits import LIMITS
from octavo_server.openai.family_messages import described, for_gemma, for_harmony
from octavo_server.parsers.gemma import GemmaParser
from octavo_server.served_model import ServedModel

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def render_chat(
    served: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text; raises a 400 naming the message at fault. May take long: call off the event loop."""
    if continue_final_message and add_generation_prompt:
        raise bad_request(
            "continue_final_message: cannot be combined with add_generation_prompt; set the latter to false",
            "continue_final_message",
        )
    template = served.chat_template or served.tokenizer.chat_template
    speaks_developer = "developer" in (template or "")
    normalized = [_message(m, f"messages[{i}]", speaks_developer) for i, m in enumerate(messages)]
    served.check_characters("".join(str(m.get("content") or "") for m in normalized), "messages")
    if served.speaks_harmony:
        normalized, tools = for_harmony(normalized), described(tools or ())
    elif served.tool_parser is GemmaParser and "tools" not in (template or ""):
        normalized, tools = for_gemma(normalized, tools or ()), None
    try:
        return served.tokenizer.apply_chat_template(
            normalized,
            tools=tools or None,
            chat_template=served.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
    except InvalidRequestError as error:
        if error.param is None:
            error.param = "messages"
        raise from_engine_error(error) from None


def _message(message: Mapping[str, Any], path: str, speaks_developer: bool) -> dict[str, Any]:
    """The message as templates expect it: text content, arguments as objects."""
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(f"{path}.role: must be one of {', '.join(ROLES)}, got {_short(role)}", f"{path}.role")
    if role == "developer" and not speaks_developer:
        role = "system"
    result: dict[str, Any] = {"role": role, "content": _content(message, path)}
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise bad_request(f"{path}.{name}: expected a string, got {_short(value)}", f"{path}.{name}")
        result[name] = value
    if "reasoning" in result:
        result.setdefault("reasoning_content", result["reasoning"])
    if message.get("tool_calls"):
        result["tool_calls"] = _tool_calls(message["tool_calls"], f"{path}.tool_calls")
    return result


def _content(message: Mapping[str, Any], path: str) -> str:
    content = message.get("content")
    path = f"{path}.content"
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("role") == "assistant":
            return ""
        raise bad_request(f"{path}: missing; this field is required", path)
    if not isinstance(content, list):
        raise bad_request(f"{path}: expected a string or a list of parts, got {_short(content)}", path)
    if len(content) > LIMITS.content_parts:
        raise bad_request(f"{path}: at most {LIMITS.content_parts} parts, got {len(content)}", path)
    return "\n".join(_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise bad_request(f"{path}: expected an object with a type, got {_short(part)}", path)
    kind = part["type"]
    if kind not in _TEXT_PARTS:
        raise bad_request(f"{path}.type: this model takes text only, got {_short(kind)}", f"{path}.type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise bad_request(f"{path}.text: expected a string, got {_short(text)}", f"{path}.text")
    return text


def _tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or len(calls) > LIMITS.tools:
        raise bad_request(f"{path}: expected a list of at most {LIMITS.tools} calls", path)
    return [_tool_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"{path}.function.name: missing; this field is required", f"{path}.function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise bad_request(f"{path}.function.arguments: is not valid JSON", f"{path}.function.arguments") from None
    if not isinstance(arguments, dict | None):
        raise bad_request(f"{path}.function.arguments: must hold a JSON object", f"{path}.function.arguments")
    return {**call, "type": "function", "function": {**function, "arguments": arguments or {}}}


def _short(value: object) -> str:
    """What was sent, by kind or in a few characters, never a long text."""
    if isinstance(value, str):
        return repr(value[:40])
    return "nothing" if value is None else type(value).__name__
