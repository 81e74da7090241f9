"""Conversations with tools as some families want them: gpt-oss one call a message, Gemma 3 all in plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]

GEMMA_INSTRUCTIONS = """You can call the functions listed below. To call one, answer with nothing but a JSON object
{"name": function name, "parameters": object of argument names and values}
and with one such object a line to call several. Their results come back in a block marked tool_output. Answer as usual
when no function helps.
"""


def for_harmony(messages: Sequence[Message]) -> list[Message]:
    """As the template of gpt-oss takes them: thoughts in `thinking`, one call a message with its result behind it.

    The template keeps the thoughts that led to calls, but not beside an answer's text, which therefore joins them.
    """
    results = {str(message.get("tool_call_id")): message for message in messages if message["role"] == "tool"}
    told: set[int] = set()
    shaped: list[Message] = []
    for message in messages:
        if id(message) in told:
            continue
        told.add(id(message))
        calls = message.get("tool_calls") or []
        thoughts = message.get("reasoning_content", "")
        if not calls:
            shaped.append(message | ({"thinking": thoughts} if thoughts else {}))
            continue
        before_calls = "\n".join(filter(None, (thoughts, message.get("content"))))
        for position, call in enumerate(calls):
            thinking = {"thinking": before_calls} if before_calls and position == 0 else {}
            shaped.append({"role": message["role"], "content": "", "tool_calls": [call], **thinking})
            result = results.get(str(call.get("id")))
            if result is not None and id(result) not in told:
                told.add(id(result))
                shaped.append(result)
    return shaped


def described(tools: Tools) -> Tools:
    """Every function with a description, without which the template of gpt-oss fails."""
    return [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]


def for_gemma(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """For a template that knows no tools: the functions in a system message, calls and results as text.

    Roles must alternate, so neighbours of one role become one message.
    """
    shaped: list[Message] = []
    for message in messages:
        plain = _plain(message)
        if shaped and shaped[-1]["role"] == plain["role"]:
            shaped[-1]["content"] += f"\n\n{plain['content']}"
        else:
            shaped.append(plain)
    if not tools:
        return shaped
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    listed = f"{GEMMA_INSTRUCTIONS}\n{functions}"
    if shaped and shaped[0]["role"] == "system":
        shaped[0]["content"] += f"\n\n{listed}"
        return shaped
    return [{"role": "system", "content": listed}, *shaped]


def _plain(message: Message) -> Message:
    """A message without fields for tools."""
    role, content = message["role"], message["content"]
    if role in ("tool", "function"):
        return {"role": "user", "content": f"```tool_output\n{content}\n```"}
    calls = [
        json.dumps({"name": function["name"], "parameters": function["arguments"]}, ensure_ascii=False)
        for function in (call["function"] for call in message.get("tool_calls") or [])
    ]
    return {"role": role, "content": "\n".join(filter(None, (content, *calls)))}
