"""Which language an answer must belong to, whichever field asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo_engine.errors import InvalidRequestError
from octavo_engine.sampling_params import StructuredOutput
from octavo_server.errors import bad_request
from octavo_server.openai.request_types import ResponseFormat, SamplingFields, StructuredOutputs
from octavo_server.parsers.gemma import GemmaParser
from octavo_server.parsers.harmony import (
    ANSWER_OPENING,
    ARGUMENTS_OPENING,
    CALL_OPENING,
    CONSTRAIN,
    MESSAGE,
    HarmonyParser,
)
from octavo_server.parsers.json_list import JsonListParser
from octavo_server.parsers.tool_calls import CLOSE, OPEN, HermesParser, Llama3JsonParser

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the engine enforces, and the request's field that asked for it.

    harmony_opening: what gpt-oss finds in its prompt, so that it can begin with what is enforced.
    """

    structured: StructuredOutput
    param: str
    harmony_opening: str = ANSWER_OPENING


def requested_constraint(fields: SamplingFields) -> Constraint | None:
    """The one constraint of a request; raises a 400 for several, or for one that cannot be kept."""
    found = [
        constraint
        for constraint in (
            _from_response_format(fields.response_format),
            _from_structured_outputs(fields.structured_outputs),
            *_from_guided_fields(fields),
        )
        if constraint is not None
    ]
    if fields.guided_whitespace_pattern is not None and fields.guided_json is None:
        raise bad_request("guided_whitespace_pattern: only allowed with guided_json", "guided_whitespace_pattern")
    if len(found) > 1:
        raise bad_request(f"{found[1].param}: only one of {found[0].param} and {found[1].param} may be given",
                          found[1].param)  # fmt: skip
    if not found:
        return None
    try:
        found[0].structured.validate()
    except InvalidRequestError as error:
        complaint = str(error).partition(": ")[2] or str(error)
        raise bad_request(f"{found[0].param}: {complaint}", found[0].param) from None
    return found[0]


def tool_choice_constraint(
    choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]], parser: object
) -> Constraint | None:
    """A grammar of exactly one call for `required` or a named function, in the format the model's parser reads."""
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        wanted = [tool["function"] for tool in tools]
    else:
        name = _named_function(choice)
        wanted = [tool["function"] for tool in tools if tool["function"]["name"] == name]
        if not wanted:
            raise bad_request(f"tool_choice: no tool is named {name[:64]!r}", "tool_choice")
    if parser is HarmonyParser:
        return _harmony_call(wanted)
    key = "parameters" if parser in (Llama3JsonParser, GemmaParser) else "arguments"
    calls: dict[str, Any] = {"anyOf": [_call_schema(function, key) for function in wanted]}
    if parser is JsonListParser:
        calls = {"type": "array", "items": calls, "minItems": 1, "maxItems": 1}
    if parser is not HermesParser:
        return Constraint(StructuredOutput(json_schema=_text(calls)), "tool_choice")
    grammar = f"start: {_text(OPEN)} call {_text(CLOSE)}\ncall: %json {_text(calls)}\n"
    return Constraint(StructuredOutput(grammar=grammar), "tool_choice")


def _harmony_call(wanted: Sequence[Mapping[str, Any]]) -> Constraint:
    """One function is named in the prompt; among several the model chooses by a grammar with the tags of the format."""
    schemas = [_text(function.get("parameters") or _NO_PARAMETERS) for function in wanted]
    if len(wanted) == 1:
        opening = f"{CALL_OPENING}{wanted[0]['name']}{ARGUMENTS_OPENING}"
        return Constraint(StructuredOutput(json_schema=schemas[0]), "tool_choice", opening)
    names = [function["name"] for function in wanted]
    calls = [
        f'call{i}: {_text(name + " ")} {CONSTRAIN} "json" {MESSAGE} arguments{i}\narguments{i}: %json {schema}\n'
        for i, (name, schema) in enumerate(zip(names, schemas, strict=True))
    ]
    start = "start: " + " | ".join(f"call{i}" for i in range(len(wanted))) + "\n"
    return Constraint(StructuredOutput(grammar=start + "".join(calls)), "tool_choice", CALL_OPENING)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The functions' names; raises a 400 naming the tool at fault."""
    names: list[str] = []
    for position, tool in enumerate(tools):
        path = f"tools[{position}]"
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise bad_request(f"{path}.type: only tools of type function are supported", f"{path}.type")
        name = function.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= 128:
            raise bad_request(f"{path}.function.name: must have 1 to 128 characters", f"{path}.function.name")
        if name in names:
            raise bad_request(f"{path}.function.name: {name!r} is given twice", f"{path}.function.name")
        if not isinstance(function.get("parameters"), dict | None):
            raise bad_request(f"{path}.function.parameters: must be a JSON Schema", f"{path}.function.parameters")
        names.append(name)
    return names


def _named_function(choice: str | Mapping[str, Any] | None) -> str:
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise bad_request("tool_choice: must be none, auto, required or name a function", "tool_choice")
    return name


def _call_schema(function: Mapping[str, Any], arguments_key: str) -> dict[str, Any]:
    parameters = function.get("parameters") or _NO_PARAMETERS
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, arguments_key: parameters},
        "required": ["name", arguments_key],
        "additionalProperties": False,
    }


def _from_response_format(chosen: ResponseFormat | None) -> Constraint | None:
    if chosen is None or chosen.type == "text":
        return None
    if chosen.type == "json_object":
        return Constraint(StructuredOutput(json_object=True), "response_format")
    if chosen.type == "json_schema":
        if chosen.json_schema is None:
            raise bad_request("response_format.json_schema: missing; this field is required", "response_format")
        return Constraint(StructuredOutput(json_schema=_text(chosen.json_schema.schema)), "response_format.json_schema")
    raise bad_request("response_format.type: must be one of text, json_object, json_schema", "response_format.type")


def _from_structured_outputs(chosen: StructuredOutputs | None) -> Constraint | None:
    if chosen is None:
        return None
    structured = StructuredOutput(
        json_schema=None if chosen.json is None else _schema_text(chosen.json),
        regex=chosen.regex,
        grammar=chosen.grammar,
        choice=None if chosen.choice is None else tuple(chosen.choice),
        json_object=bool(chosen.json_object),
        whitespace_pattern="" if chosen.disable_any_whitespace else chosen.whitespace_pattern,
    )
    return Constraint(structured, "structured_outputs")


def _from_guided_fields(fields: SamplingFields) -> list[Constraint]:
    """vLLM's older names."""
    found: list[Constraint] = []
    if fields.guided_json is not None:
        structured = StructuredOutput(
            json_schema=_schema_text(fields.guided_json), whitespace_pattern=fields.guided_whitespace_pattern
        )
        found.append(Constraint(structured, "guided_json"))
    if fields.guided_regex is not None:
        found.append(Constraint(StructuredOutput(regex=fields.guided_regex), "guided_regex"))
    if fields.guided_choice is not None:
        found.append(Constraint(StructuredOutput(choice=tuple(fields.guided_choice)), "guided_choice"))
    if fields.guided_grammar is not None:
        found.append(Constraint(StructuredOutput(grammar=fields.guided_grammar), "guided_grammar"))
    return found


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    return schema if isinstance(schema, str) else _text(schema)


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
