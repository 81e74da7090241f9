"""Reading the few fields of a body that routing needs."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.errors import BadRequestError
from octavo_gateway.inspection import MAX_COST_TOKENS, inspect_body


def body(**fields: object) -> bytes:
    return json.dumps({"model": "m"} | fields).encode()


def test_it_reads_model_stream_and_cost() -> None:
    seen = inspect_body(body(stream=True, max_tokens=50, n=2, messages=[{"role": "user", "content": "x" * 400}]))

    assert (seen.model, seen.stream, seen.output_tokens) == ("m", True, 100)
    assert 100 <= seen.prompt_tokens <= 115
    assert seen.cost == seen.prompt_tokens + 100


def test_a_conversation_shares_its_prefix_with_its_next_turn() -> None:
    turns = [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "answer " * 300}]
    first = inspect_body(body(messages=turns[:1])).prefix("m", None, "")
    second = inspect_body(body(messages=turns, temperature=0.3)).prefix("m", None, "")

    assert len(first) >= 5
    assert second[: len(first) - 1] == first[: len(first) - 1]


def test_tools_tenant_adapter_and_model_keep_prefixes_apart() -> None:
    messages = [{"role": "user", "content": "long " * 300}]
    plain = inspect_body(body(messages=messages))
    tools = inspect_body(body(messages=messages, tools=[{"type": "function"}]))
    variants = [
        plain.prefix("m", None, ""),
        plain.prefix("m", None, "salt"),
        plain.prefix("m", "adapter", ""),
        plain.prefix("other", None, ""),
        tools.prefix("m", None, ""),
    ]

    assert len({v[0] for v in variants}) == len(variants)


def test_an_absurd_token_limit_does_not_make_an_absurd_cost() -> None:
    assert inspect_body(body(max_tokens=2**62, n=2**31)).cost == MAX_COST_TOKENS


@pytest.mark.parametrize("field", ["model", "stream", "max_tokens", "n", "priority"])
def test_a_field_of_the_wrong_type_is_named(field: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        inspect_body(body(**{field: {"a": 1}}))

    assert caught.value.param == field
    assert caught.value.status == 400


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_body_breaks_it(data: bytes) -> None:
    with contextlib.suppress(BadRequestError):
        inspect_body(data)


Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
Fields = st.sampled_from(["messages", "prompt", "input", "tools", "stream", "max_tokens", "x", "priority"])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(Fields, Json))
def test_any_json_object_is_read_or_refused_with_a_name(fields: dict[str, object]) -> None:
    try:
        seen = inspect_body(body(**fields))
    except BadRequestError as error:
        named = error.param
    else:
        assert seen.model == "m"
        assert seen.cost >= 1
        return
    assert named in fields
