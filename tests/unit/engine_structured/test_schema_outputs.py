"""All that is generated under a JSON Schema keeps to it, or the schema is refused; the jsonschema package judges."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from char_tokenizer import CHARACTERS, CharTokenizer
from fake_runner import EOS, VOCAB_SIZE
from octavo_engine.errors import InvalidRequestError
from octavo_engine.sampling_params import StructuredOutput
from octavo_engine.structured.grammar import GrammarCompiler, GrammarConstraint

COMPILER = GrammarCompiler(CharTokenizer(), VOCAB_SIZE, frozenset({EOS}))
FREE_STEPS, MOST_STEPS = 60, 2_000
CLOSING = [EOS, *(CHARACTERS.index(char) for char in '"}],:{[')]  # once an output is long, it is brought to its end

STR, INT, NUM = {"type": "string"}, {"type": "integer"}, {"type": "number"}
ACCEPTED: dict[str, Any] = {
    "anything": {},
    "true": True,
    "types": {"type": ["string", "null", "boolean"]},
    "enum": {"enum": ["a", 1, None, {"x": [1, 2]}, "with \" and \\"]},
    "const": {"const": {"a": [True, None]}},
    "integer bounds": {"type": "integer", "minimum": -12, "maximum": 345},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 9},
    "number bounds": {"type": "number", "minimum": 0.5, "maximum": 1.25},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}(x|yy)$"},
    "part of a pattern": {"type": "string", "pattern": "b+"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "array": {"type": "array", "items": INT, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [STR, INT], "items": False, "minItems": 2},
    "tuple and more": {"type": "array", "prefixItems": [STR], "items": {"type": "boolean"}, "maxItems": 4},
    "object": {"type": "object", "properties": {"a": STR, "b": INT}, "required": ["b"], "additionalProperties": False},
    "more properties": {"type": "object", "properties": {"a": INT}, "additionalProperties": {"type": "boolean"}},
    "named by pattern": {"type": "object", "patternProperties": {"^n_": INT}, "additionalProperties": False},
    "required without properties": {"type": "object", "required": ["k"]},
    "any of": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "array", "items": NUM, "maxItems": 2}]},
    "one of, apart": {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
                                {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]}]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": INT}, "required": ["a"]},
                         {"type": "object", "properties": {"b": STR}, "required": ["b"]}]},
    "bounds that meet": {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    "definitions": {"$ref": "#/$defs/pair", "$defs": {"pair": {"type": "array", "items": INT, "maxItems": 2}}},
    "a tree": {"$defs": {"node": {"type": "object", "properties": {
        "v": INT, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"],
        "additionalProperties": False}}, "$ref": "#/$defs/node"},
    "siblings of a reference": {"$defs": {"s": STR}, "allOf": [{"$ref": "#/$defs/s"}, {"maxLength": 3}]},
    "annotations": {"title": "T", "description": "d", "default": 3, "examples": [1], "type": "integer"},
}  # fmt: skip
PERHAPS: dict[str, Any] = {  # kept to or refused, whatever the compiler knows
    "not": {"not": STR},
    "if": {"type": "object", "properties": {"a": INT}, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "unique": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2},
    "contains": {"type": "array", "items": INT, "contains": {"const": 3}},
    "how many properties": {"type": "object", "minProperties": 2, "maxProperties": 3},
    "names of properties": {"type": "object", "propertyNames": {"maxLength": 2}},
    "dependent": {"type": "object", "dependentRequired": {"a": ["b"]}, "required": ["a"]},
    "unevaluated": {"type": "object", "properties": {"a": INT}, "unevaluatedProperties": False},
    "one of, overlapping": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]},
    "multiple of a fraction": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
    "unknown format": {"type": "string", "format": "no-such-format"},
    "regular expression look-ahead": {"type": "string", "pattern": "^(?=a)a+$"},
    "impossible": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "false": False,
}


def outputs(schema: Any, seeds: range) -> list[str]:
    """Random outputs under a schema; raises `InvalidRequestError` when it is refused."""
    return [walk(COMPILER.compile(StructuredOutput(json_schema=json.dumps(schema))), random.Random(s)) for s in seeds]


def walk(constraint: GrammarConstraint, rng: random.Random) -> str:
    """Characters chosen at random from those allowed, and the quickest way to the end when there are many."""
    tokens: list[int] = []
    row = torch.empty(VOCAB_SIZE)
    while not constraint.is_complete:
        row.zero_()
        constraint.mask(row)
        allowed = (row == 0).nonzero().flatten().tolist()
        assert allowed
        assert len(tokens) < MOST_STEPS, "no end in sight"
        hurries = len(tokens) >= FREE_STEPS and rng.random() < 0.7
        quick = [token for token in CLOSING if token in allowed] if hurries else []
        token = quick[0] if quick else rng.choice(allowed)
        constraint.accept(token)
        if token == EOS:
            break
        tokens.append(token)
    return CharTokenizer().decode(tokens)


def check(schema: Any, text: str) -> None:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    validator.validate(json.loads(text))


@pytest.mark.parametrize("name", ACCEPTED)
def test_everything_generated_is_valid(name: str) -> None:
    for text in outputs(ACCEPTED[name], range(12)):
        check(ACCEPTED[name], text)


@pytest.mark.parametrize("name", PERHAPS)
def test_what_cannot_be_kept_to_is_refused(name: str) -> None:
    try:
        texts = outputs(PERHAPS[name], range(25))
    except InvalidRequestError:
        return
    for text in texts:
        check(PERHAPS[name], text)


leaves = st.one_of(
    st.sampled_from([STR, INT, NUM, {"type": "boolean"}, {"type": "null"}, True, {}]),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
              st.integers(-20, 20), st.integers(0, 30)),
    st.builds(lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
              st.integers(0, 3), st.integers(0, 4)),
    st.lists(st.one_of(st.integers(-5, 5), st.booleans(), st.none(), st.sampled_from(["a", "b c"])), min_size=1,
             max_size=4).map(lambda values: {"enum": values}),
    st.sampled_from(["^a+$", "^[0-9]{2}$", "^(x|yz)$", "^(ab)*$"]).map(lambda p: {"type": "string", "pattern": p}),
)  # fmt: skip
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
                  inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda properties, more: {"type": "object", "properties": properties,
                                            "required": sorted(properties)[::2], "additionalProperties": more},
                  st.dictionaries(st.sampled_from(["a", "b", "c d", "e"]), inner, max_size=3), st.booleans()),
        st.builds(lambda kind, parts: {kind: parts}, st.sampled_from(["anyOf", "allOf", "oneOf"]),
                  st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas)
def test_any_schema_is_kept_to_or_refused(schema: Any) -> None:
    try:
        texts = outputs(schema, range(3))
    except InvalidRequestError:
        return
    for text in texts:
        check(schema, text)
