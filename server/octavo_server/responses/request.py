"""The request of `/v1/responses` and the chat it stands for."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from octavo_server.errors import bad_request
from octavo_server.limits import LIMITS
from octavo_server.openai.request_types import (
    ChatCompletionRequest,
    Identifier,
    JsonObject,
    JsonSchema,
    MaxTokens,
    ModelName,
    ResponseFormat,
    Seed,
    Size,
)
from octavo_server.parsing import Refused

REFUSED_FIELDS = {
    "background": Refused("responses are not stored; keep the connection open"),
    "previous_response_id": Refused("responses are not stored; send the whole conversation in input"),
    "conversation": Refused("conversations are not stored; send the whole conversation in input"),
    "prompt": Refused("stored prompts are not supported; send instructions and input"),
    "max_tool_calls": Refused("only function tools are supported"),
    "include": Refused("only what every response holds can be shown"),
    "truncation": Refused("not supported; shorten the input", off=('"disabled"',)),
    "suffix": Refused("insertion is not supported"),
}


class TextFormat(Struct, frozen=True):
    """`text.format`."""

    type: str = "text"
    name: Identifier = "response"
    schema: JsonObject | bool | None = None
    strict: bool | None = None


class TextOptions(Struct, frozen=True):
    """`text`."""

    format: TextFormat | None = None


class ReasoningOptions(Struct, frozen=True):
    """`reasoning`."""

    effort: Identifier | None = None
    summary: str | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    """`POST /v1/responses`, with vLLM's sampling extras."""

    input: str | Annotated[list[JsonObject], Meta(min_length=1, max_length=LIMITS.messages)]
    model: ModelName | None = None
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Size | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LIMITS.logprobs)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[JsonObject], Meta(max_length=LIMITS.tools)] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: Annotated[JsonObject, Meta(max_length=LIMITS.template_kwargs)] | None = None
    cache_salt: Identifier | None = None
    priority: Annotated[int, Meta(ge=-LIMITS.priority, le=LIMITS.priority)] | None = None


def as_chat(request: ResponsesRequest) -> ChatCompletionRequest:
    """The same conversation as a chat request; raises a 400 naming the item at fault."""
    return ChatCompletionRequest(
        messages=_messages(request),
        model=request.model,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        stream=request.stream,
        response_format=_response_format(request.text),
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or [])] or None,
        tool_choice=request.tool_choice if request.tools else None,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        chat_template_kwargs=request.chat_template_kwargs,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )


def _messages(request: ResponsesRequest) -> list[JsonObject]:
    messages: list[JsonObject] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for position, item in enumerate(request.input):
        _add_item(messages, item, f"input[{position}]")
    return messages


def _add_item(messages: list[JsonObject], item: JsonObject, path: str) -> None:
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        call = {
            "id": _string(item, "call_id", path),
            "type": "function",
            "function": {"name": _string(item, "name", path), "arguments": _string(item, "arguments", path)},
        }
        last = messages[-1] if messages else None
        if last is not None and last["role"] == "assistant":
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str | list) else msgspec.json.encode(output).decode()
        messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", path), "content": text})
    elif kind != "reasoning":  # thoughts of earlier turns are not shown to the model again
        raise bad_request(
            f"{path}.type: must be message, function_call, function_call_output or reasoning", f"{path}.type"
        )


def _tool(tool: JsonObject, path: str) -> JsonObject:
    if tool.get("type") != "function":
        raise bad_request(f"{path}.type: only tools of type function are supported", f"{path}.type")
    if isinstance(tool.get("function"), dict):
        return tool
    function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _response_format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    chosen = text.format
    if chosen.type == "json_schema":
        if chosen.schema is None:
            raise bad_request("text.format.schema: missing; this field is required", "text.format.schema")
        return ResponseFormat("json_schema", JsonSchema(chosen.name, chosen.schema, chosen.strict))
    if chosen.type != "json_object":
        raise bad_request("text.format.type: must be one of text, json_object, json_schema", "text.format.type")
    return ResponseFormat("json_object")


def _string(item: JsonObject, name: str, path: str) -> str:
    value: Any = item.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{path}.{name}: expected a string", f"{path}.{name}")
    return value
