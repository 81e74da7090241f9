"""Embeddings, scores and reranking over a real socket, with the official client."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]


@pytest.fixture
async def server(serve: Serve) -> Any:
    return await serve(FakeEngine(task="embed", max_model_len=64))


async def test_vectors_come_in_the_order_of_the_texts(server: Any) -> None:
    both = await server.openai.embeddings.create(model="fake-model", input=["a", "bb"], encoding_format="float")
    second = await server.openai.embeddings.create(model="fake-model", input="bb", encoding_format="float")

    assert [item.index for item in both.data] == [0, 1]
    assert both.data[1].embedding == second.data[0].embedding
    assert both.usage.prompt_tokens == 5


async def test_base64_holds_the_same_floats(server: Any) -> None:
    _, plain, _ = await server.post("/v1/embeddings", {"input": [[1, 2, 3]]})
    _, packed, _ = await server.post("/v1/embeddings", {"input": [1, 2, 3], "encoding_format": "base64"})

    unpacked = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype="<f4")
    assert unpacked.tolist() == pytest.approx(plain["data"][0]["embedding"], rel=1e-6)


async def test_fewer_dimensions_are_normalized_again(server: Any) -> None:
    _, body, _ = await server.post("/v1/embeddings", {"input": "abc", "dimensions": 3})

    vector = body["data"][0]["embedding"]
    assert len(vector) == 3
    assert math.hypot(*vector) == pytest.approx(1.0)


async def test_wrong_requests_name_the_field(server: Any) -> None:
    cases = [
        ({}, "input"),
        ({"input": ""}, None),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a", "x" * 100]}, "input[1]"),
        ({"input": [[999]]}, "input"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ]
    for body, param in cases:
        status, answer, _ = await server.post("/v1/embeddings", body)
        assert status == (400 if param else 200), body
        if param:
            assert answer["error"]["param"] == param, body


async def test_a_long_text_is_cut_when_asked_for(server: Any) -> None:
    status, body, _ = await server.post("/v1/embeddings", {"input": "x" * 100, "truncate_prompt_tokens": -1})

    assert status == 200
    assert body["usage"]["prompt_tokens"] == 64


async def test_a_score_is_highest_for_equal_texts(server: Any) -> None:
    for path in ("/score", "/v1/score"):
        _, body, _ = await server.post(path, {"text_1": "same", "text_2": ["same", "other"]})
        assert body["data"][0]["score"] == pytest.approx(1.0)
        assert body["data"][1]["score"] < 1.0

    _, paired, _ = await server.post("/score", {"queries": ["a", "b"], "documents": ["a", "b"]})
    assert [item["score"] for item in paired["data"]] == pytest.approx([1.0, 1.0])
    status, answer, _ = await server.post("/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]})
    assert (status, answer["error"]["param"]) == (400, "queries")


async def test_reranking_puts_the_nearest_first(server: Any) -> None:
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        _, body, _ = await server.post(
            path, {"query": "bread", "documents": ["stone", {"text": "bread"}, "water"], "top_n": 2}
        )
        assert body["results"][0]["index"] == 1
        assert body["results"][0]["document"] == {"text": "bread"}
        assert len(body["results"]) == 2
        scores = [item["relevance_score"] for item in body["results"]]
        assert scores == sorted(scores, reverse=True)


async def test_a_model_of_the_other_kind_says_so(serve: Serve, server: Any) -> None:
    generating = await serve()

    status, answer, _ = await generating.post("/v1/embeddings", {"input": "a"})
    assert (status, answer["error"]["param"]) == (400, "model")
    status, answer, _ = await server.post("/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["param"]) == (400, "model")


async def test_open_inference_gives_vectors_as_a_tensor(server: Any) -> None:
    _, metadata, _ = await server.post("/v2/repository/index", {})
    status, body, _ = await server.post(
        "/v2/models/fake-model/infer",
        {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}]},
    )

    assert metadata[0]["state"] == "READY"
    assert status == 200
    assert body["outputs"][0]["shape"] == [2, 8]
