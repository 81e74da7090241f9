"""Bodies become typed structs or one 400 that names the field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_server.errors import ApiError
from octavo_server.openai.refused_fields import REFUSED_FIELDS
from octavo_server.openai.request_types import ChatCompletionRequest, CompletionRequest
from octavo_server.parsing import Refused, parse


class Inner(msgspec.Struct):
    size: int


class Body(msgspec.Struct):
    name: str
    inner: list[Inner] = []


def refusal(body: bytes, refused: dict[str, Refused] | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, Body, refused)
    assert caught.value.status == 400
    return caught.value


def test_a_good_body_is_typed_and_its_unknown_fields_are_named() -> None:
    parsed = parse(b'{"name": "a", "inner": [{"size": 1}], "x": 1, "y": 2}', Body)

    assert parsed.request == Body("a", [Inner(1)])
    assert parsed.unknown_fields == ("x", "y")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"inner": []}', "name"),
        (b'{"name": 1}', "name"),
        (b'{"name": "a", "inner": [{"size": 1}, {"size": "2"}]}', "inner[1].size"),
        (b'{"name": "a", "inner": [{}]}', "inner[0].size"),
    ],
)
def test_the_field_is_named_by_its_path(body: bytes, param: str) -> None:
    error = refusal(body)

    assert error.param == param
    assert error.message.startswith(f"{param}: ")


def test_a_refused_field_is_allowed_while_it_is_off() -> None:
    refused = {"beam": Refused("not supported")}

    for value in ("null", "false", "[]", "{}", '""'):
        assert parse(f'{{"name": "a", "beam": {value}}}'.encode(), Body, refused).unknown_fields == ()
    assert refusal(b'{"name": "a", "beam": true}', refused).param == "beam"


def test_brackets_inside_strings_are_no_nesting() -> None:
    body = json.dumps({"name": '"' + "[{" * 500 + "\\"}).encode()

    assert parse(body, Body).request.name.count("[") == 500


def test_messages_are_bounded_whatever_is_sent() -> None:
    error = refusal(json.dumps({"name": {"x" * 100_000: 1}}).encode())

    assert len(error.message) < 2_100


def status_of(body: bytes, kind: type[msgspec.Struct]) -> int:
    try:
        parse(body, kind, REFUSED_FIELDS)
    except ApiError as error:
        return error.status
    return 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *REFUSED_FIELDS})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6))
def test_any_object_is_taken_or_refused_with_a_400(body: dict[str, Any]) -> None:
    for kind in (ChatCompletionRequest, CompletionRequest):
        assert status_of(json.dumps(body).encode(), kind) in (200, 400)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused_with_a_400(body: bytes) -> None:
    assert status_of(body, Body) in (200, 400)
