"""A router's hashes of a prompt's text, as they come in a header and go to the engine."""

from __future__ import annotations

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_server.errors import ApiError
from octavo_server.prompt_prefix import NO_PREFIX, prefix_from


def header(num_bytes: int, block: int, hashes: list[int]) -> str:
    return f"{num_bytes}/{block};{base64.b64encode(struct.pack(f'<{len(hashes)}Q', *hashes)).decode()}"


@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=256),
    rest=st.integers(0, 255),
    num_tokens=st.integers(1, 100_000),
)
def test_labels_lie_on_the_prompts_tokens_in_order(hashes: list[int], rest: int, num_tokens: int) -> None:
    labels = prefix_from(header(256 * len(hashes) + rest, 256, hashes)).labels(num_tokens)
    assert [label for _, label in labels] == hashes
    positions = [position for position, _ in labels]
    assert positions == sorted(positions)
    assert 1 <= positions[0] <= positions[-1] <= num_tokens
    if not rest:
        assert positions[-1] == num_tokens


def test_no_header_is_no_label() -> None:
    assert prefix_from(None) is NO_PREFIX
    assert NO_PREFIX.labels(100) == []


@pytest.mark.parametrize(
    "value",
    [
        "",
        "256;AAAAAAAAAAA=",
        "-1/256;AAAAAAAAAAA=",
        "256/0;AAAAAAAAAAA=",
        "255/256;AAAAAAAAAAA=",
        "256/256;",
        "256/256;AAAA",
        "256/256;!!!!",
        "256/256;A",
        header(10**9, 1, [1] * 257),
        "9" * 13 + "/1;AAAAAAAAAAA=",
    ],
)
def test_a_malformed_header_is_refused_by_name(value: str) -> None:
    with pytest.raises(ApiError, match="x-octavo-prefix") as refused:
        prefix_from(value)
    assert refused.value.status == 400
