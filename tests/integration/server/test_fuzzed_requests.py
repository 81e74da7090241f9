"""Whatever is sent to whatever route: never a 5xx, never a hang, nothing left in the engine, neighbours undisturbed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.asgi_client import asgi_call
from fakes.byte_tokenizer import ByteTokenizer
from fakes.fake_engine import FakeEngine
from octavo_server.app import build_app
from octavo_server.oip.http_codec import InferBody
from octavo_server.openai.embeddings import EmbeddingRequest
from octavo_server.openai.ranking import RerankRequest, ScoreRequest
from octavo_server.openai.refused_fields import REFUSED_FIELDS
from octavo_server.openai.request_types import ChatCompletionRequest, CompletionRequest
from octavo_server.openai.tokens import DetokenizeRequest, TokenizeRequest
from octavo_server.replica import Replica
from octavo_server.responses.request import REFUSED_FIELDS as RESPONSES_REFUSED
from octavo_server.responses.request import ResponsesRequest
from octavo_server.settings import ServeSettings

ROUTES: dict[str, set[str]] = {
    "/v1/chat/completions": {*ChatCompletionRequest.__struct_fields__, *REFUSED_FIELDS},
    "/v1/completions": {*CompletionRequest.__struct_fields__, *REFUSED_FIELDS},
    "/v1/responses": {*ResponsesRequest.__struct_fields__, *RESPONSES_REFUSED},
    "/v1/embeddings": set(EmbeddingRequest.__struct_fields__),
    "/score": set(ScoreRequest.__struct_fields__),
    "/rerank": set(RerankRequest.__struct_fields__),
    "/tokenize": set(TokenizeRequest.__struct_fields__),
    "/detokenize": set(DetokenizeRequest.__struct_fields__),
    "/v2/models/fake-model/infer": set(InferBody.__struct_fields__),
    "/v2/models/fake-model/generate": {"text_input", "parameters", "stream", "sampling_parameters", "max_tokens", "id"},
    "/v2/models/fake-model/generate_stream": {"text_input", "parameters", "stream", "sampling_parameters"},
    "/v2/repository/index": {"ready"},
    "/v2/repository/models/fake-model/load": {"parameters"},
    "/v2/logging": {"log_info", "log_verbose_level", "log_file"},
    "/v2/trace/setting": {"trace_level", "trace_rate"},
}
MESSAGE = {"role": "user", "content": "Hi"}
TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}
CANARY = "canary-7f3a"

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2, 16, 64, 65, 257, 2**31, -(2**31), 2**63, 2**64, 10**400, 0.0, 0.5, -0.0, 1e308])
    | st.sampled_from(["", "a", CANARY, "\x00", "\ud7ff", "𝔘", "auto", "required", "text", "json_object", "fake-model"])
    | st.text(max_size=6)
)
values = st.recursive(
    scalars
    | st.sampled_from([MESSAGE, [MESSAGE], TENSOR, [TENSOR], {"type": "json_object"}, {"include_usage": True},
                       [{"type": "function", "function": {"name": "f"}}], [{"type": "text", "text": CANARY}]]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "name", "function", "text", "json", "65", "shape", "data"]),
        inner, max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip


class Target:
    """A replica of each kind behind one event loop."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.engines = {task: FakeEngine(task=task, max_model_len=128) for task in ("generate", "embed")}
        self.apps = {task: self.runner.run(self._start(engine)) for task, engine in self.engines.items()}

    async def _start(self, engine: FakeEngine) -> Any:
        settings = ServeSettings(model="fake", served_model_names=("fake-model",), tool_call_parser="hermes")
        replica = Replica(settings, engine, lambda path: ByteTokenizer())
        await replica.start()
        return build_app(replica)

    def call(self, task: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        status, _, answer = self.runner.run(asgi_call(self.apps[task], "POST", path, body, headers))
        return status, answer


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.runner.close()
    logging.getLogger("octavo").setLevel(logging.NOTSET)


def check(target: Target, path: str, body: bytes, headers: dict[str, str] | None = None) -> None:
    for task, engine in target.engines.items():
        status, answer = target.call(task, path, body, headers)
        assert status < 500 or status == 501, (path, body[:300], answer)
        if status != 200:
            error = json.loads(answer)["error"]
            message = error if isinstance(error, str) else error["message"]
            assert message
            assert len(answer) < 6_000
            if status == 400 and isinstance(error, dict):
                assert error["param"] or "body" in message.lower(), (path, body[:300], answer)
        assert engine.running == {}
        engine.received.clear()


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_any_json_object(target: Target, path: str) -> None:
    base: dict[str, Any] = {
        "model": "fake-model", "messages": [MESSAGE], "prompt": "Hi", "input": "Hi", "max_tokens": 3, "query": "a",
        "documents": ["b"], "queries": "a", "text_input": "Hi", "tokens": [1], "inputs": [TENSOR],
    }  # fmt: skip
    own = {name: value for name, value in base.items() if name in ROUTES[path]}

    @settings(max_examples=35, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(ROUTES[path])), values, max_size=4), st.booleans())
    def run(fields: dict[str, Any], complete: bool) -> None:
        check(target, path, json.dumps({**own, **fields} if complete else fields).encode())

    run()


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_any_bytes_and_headers(target: Target, path: str) -> None:
    good = json.dumps({"messages": [MESSAGE], "prompt": "Hi", "inputs": [TENSOR], "text_input": "Hi"}).encode()

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.binary(max_size=60) | st.integers(0, len(good)).map(lambda cut: good[:cut]),
        st.integers(0, len(good)),
        st.dictionaries(
            st.sampled_from([
                "x-octavo-priority", "x-octavo-deadline-ms", "x-octavo-tenant", "x-request-id", "content-encoding",
                "inference-header-content-length", "content-type", "accept-encoding", "traceparent",
            ]),
            st.sampled_from(["", "0", "-5", "999999999999999", "gzip", "deflate", "x" * 300, "é", "text/html", "12"]),
            max_size=3,
        ),
    )  # fmt: skip
    def run(noise: bytes, at: int, headers: dict[str, str]) -> None:
        for body in (noise, good[:at] + noise + good[at:]):
            for task in target.engines:
                status, _ = target.call(task, path, body, headers)
                assert status < 500 or status in (501, 504), (path, body, headers)

    run()


def test_a_neighbours_greedy_stream_stays_the_same(target: Target) -> None:
    body = json.dumps({"prompt": "Hi", "max_tokens": 40, "stream": True, "temperature": 0}).encode()

    async def texts() -> set[str]:
        hostile = [
            json.dumps({"prompt": "x", "max_tokens": value, "n": value, "logit_bias": {"1": value}}).encode()
            for value in (0, -1, 1, 2**40, None, "a", [], {})
        ]
        app = target.apps["generate"]
        answers = await asyncio.gather(
            *(asgi_call(app, "POST", "/v1/completions", body) for _ in range(4)),
            *(asgi_call(app, "POST", "/v1/completions", bad) for bad in hostile * 4),
        )
        streams = [answer.decode().split("\n\n") for _, _, answer in answers[:4]]
        return {
            "".join(json.loads(event[6:])["choices"][0]["text"] for event in events if event.startswith("data: {"))
            for events in streams
        }

    assert target.runner.run(texts()) == {"Hello from the fake engine!"}


def test_prompts_never_reach_a_log(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for body in (
            {"prompt": CANARY}, {"prompt": [CANARY, 3]}, {"prompt": CANARY, "n": "x"},
            {"prompt": "a", "stop": [CANARY]},
            {"messages": [{"role": CANARY, "content": CANARY}]}, {CANARY: CANARY}, {"prompt": CANARY * 100},
        ):  # fmt: skip
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"):
                for task in target.engines:
                    target.call(task, path, json.dumps(body).encode())

    assert CANARY not in caplog.text
