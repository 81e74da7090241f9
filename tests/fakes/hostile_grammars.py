"""Schemas, expressions and grammars made to hurt whoever compiles or follows them: 500 and more, always the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Field = str
Hostile = tuple[Field, Any]  # a field of a request and its value


def hostile_grammars() -> Iterator[Hostile]:
    """Fields of `/v1/completions` that constrain the output."""
    for schema in (*_deep(), *_wide(), *_recursive(), *_heavy_keywords(), *_nonsense_schemas()):
        yield "guided_json", schema
    for expression in _expressions():
        yield "guided_regex", expression
        yield "guided_json", {"type": "string", "pattern": expression}
        yield "response_format", _named({"type": "object", "patternProperties": {expression: {"type": "integer"}}})
    for grammar in _grammars():
        yield "guided_grammar", grammar
    for choice in ([], [""], ["a"] * 2_000, ["x" * 60_000], ["\x00"], ["🎉" * 500], ["a", "ab", "abc"] * 300):
        yield "guided_choice", choice
    for whitespace in ("(", ".*", "(a+)+", "[ ]{0,100000}", "\\", "a" * 70_000):
        yield "structured_outputs", {"json": {"type": "object"}, "whitespace_pattern": whitespace}
    for value in ({}, {"json": {}, "regex": "a"}, {"structural_tag": "x"}, {"json": "["}, {"json": "NaN"}):
        yield "structured_outputs", value


def _named(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _deep() -> Iterator[Any]:
    for depth in (5, 15, 25, 60, 500, 5_000):
        for key in ("properties", "items", "anyOf", "allOf", "not"):
            text, end = "", ""
            for _ in range(depth):
                if key == "properties":
                    text, end = text + '{"type":"object","required":["a"],"properties":{"a":', "}}" + end
                elif key in ("items", "not"):
                    text, end = text + f'{{"{key}":', "}" + end
                else:
                    text, end = text + f'{{"{key}":[', "]}" + end
            yield f'{text}{{"type":"integer"}}{end}'


def _wide() -> Iterator[Any]:
    for size in (10, 100, 1_000, 4_000):
        names = [f"p{i}" for i in range(size)]
        yield {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}
        yield {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
        yield {"enum": names}
        yield {"anyOf": [{"const": name} for name in names]}
        yield {"oneOf": [{"type": "string", "minLength": i} for i in range(size)]}
        yield {"allOf": [{"type": "integer", "minimum": i} for i in range(size)]}
        yield {"type": "array", "prefixItems": [{"type": "boolean"}] * size, "minItems": size}
        yield {"type": "object", "patternProperties": {f"^{name}.*": {} for name in names}}


def _recursive() -> Iterator[Any]:
    yield {"$ref": "#"}
    yield {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    yield {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}
    yield {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    yield {"allOf": [{"$ref": "#"}, {"type": "integer"}]}
    for size in (2, 10, 40):  # each definition names the next twice: 2^size when written out
        defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(size)}
        yield {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{size}": {"type": "null"}}}
        both = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(size)}
        yield {"$ref": "#/$defs/d0", "$defs": {**both, f"d{size}": {"type": "null"}}}
    for target in ("http://127.0.0.1/x", "file:///etc/passwd", "#/nowhere", "../../x", "", "#/$defs/%00", 3):
        yield {"$ref": target}


def _heavy_keywords() -> Iterator[Any]:
    for size in (0, 1, 10, 1_000, 10**6, 10**9, 10**18, 2**63, 10**30, -1, 0.5, 1e308):
        yield {"type": "string", "minLength": size}
        yield {"type": "string", "maxLength": size}
        yield {"type": "array", "minItems": size}
        yield {"type": "array", "items": {"type": "string", "minLength": size}, "maxItems": size}
        yield {"type": "integer", "minimum": size, "maximum": size}
        yield {"type": "number", "exclusiveMinimum": -size, "maximum": size}
        yield {"type": "number", "multipleOf": size}
        yield {"type": "object", "minProperties": size, "maxProperties": size}
    for kind in ("date-time", "uuid", "email", "ipv6", "uri", "regex", "no-such-format", "\x00", "a" * 10_000):
        yield {"type": "string", "format": kind}
    for keyword in ("if", "contains", "uniqueItems", "dependentRequired", "unevaluatedProperties", "propertyNames"):
        yield {"type": "object", keyword: True}
        yield {"type": "array", keyword: {"type": "integer"}}


def _nonsense_schemas() -> Iterator[Any]:
    yield from ("", "{", "[]", "3", '"x"', "null", "true", "false", '{"type"', "\x00", "{" * 1_000, "[" * 60_000)
    for value in (None, 3, [], {}, "nothing", ["string", "nothing"], ["string"] * 1_000, {"type": "string"}, True):
        yield {"type": value}
        yield {"enum": value}
        yield {"properties": value}
        yield {"items": value}
        yield {"required": value}
        yield {"anyOf": value}
        yield {"pattern": value}
    yield {"const": {"deep": [[[[[[[[[[1]]]]]]]]]]}}
    yield {"enum": ["\ud7ff", "\u0000", "\\", '"', "\n", "🎉", "x" * 30_000]}
    yield {"type": "object", "properties": {"": {}, "\x00": {}, '"': {}, "a" * 20_000: {}}, "required": ["", '"']}
    yield {"type": "object", "properties": {"__proto__": {}, "constructor": {}, "$ref": {"type": "string"}}}


def _expressions() -> Iterator[str]:
    yield from ("(", ")", "[", "]", "a{", "a{5,2}", "*", "+", "?", "a**", "\\", "\\p{Nope}", "(?P<n", "[z-a]", "")
    yield from ("(a+)+$", "(a|a)*b", "(.*)*x", "((a*)*)*", "(a|aa)+c", "(x+x+)+y", "^(([a-z])+.)+[A-Z]$")
    yield from ("(.{0,50}){50}", "(.?.?.?){99}", "(a*b*)*c*", "[ab]*a[ab]{40}", "(?:a?){999}a{999}")
    for count in (10, 1_000, 100_000, 10**7, 10**12):
        yield f"a{{{count}}}"
        yield f"[a-z]{{0,{count}}}"
        yield f"(ab?c){{{count}}}d"
        yield f"((a{{0,{count}}}){{0,{count}}})"
    for depth in (10, 200, 5_000):
        yield "(" * depth + "a" + ")" * depth
        yield "(a?" * depth + ")*" * depth
        yield "|".join("a" * i for i in range(1, min(depth, 300)))
    yield from ("\\p{L}{1,500}", "[^\x00]{1,2000}", "[\U00010000-\U0010ffff]+", "(?i)" + "é" * 500, "(?=a)b", "(a)\\1")
    yield from (f".*a.{{{gap}}}" for gap in (5, 12, 20, 200))
    yield from ("(?:" + "|".join(f"[{chr(97 + i % 26)}-z]{{{i}}}" for i in range(1, n)) + ")+" for n in (5, 30, 120))


def _grammars() -> Iterator[str]:
    yield from ("", "start", "start:", 'start: "a', "start: b", 'a: "x"', "start: start", 'start: start "a" | "b"')
    yield from ('start: a\na: a a | "x"', "start: a*\na: a*\n", 'start: "a"{1000000}', 'start: ("a"?){50000}')
    yield from ("start: /(/", "start: /.*/ /.*/ /.*/", "%import common.NUMBER\nstart: NUMBER", "%import os\nstart: x")
    yield from ('start: %json {"$ref": "#"}', "start: %json {", "start: %regex { }", "start: <[999999999]>", "start: @")
    for size in (10, 200, 2_000):
        yield "\n".join(["start: r0", *(f'r{i}: r{i + 1} | "a" r{i + 1}' for i in range(size)), f'r{size}: "z"'])
        yield "start: " + " | ".join(json.dumps(f"word{i}") for i in range(size))
        yield "start: " + " ".join(["a"] * size) + '\na: "x"?'
        yield "start: " + "(" * size + '"a"' + ")*" * size
