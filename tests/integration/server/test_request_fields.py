"""Every field that vLLM's and OpenAI's servers know is honoured or refused by name, never ignored.

Honoured means that something changes: what the engine is asked for or what the caller gets.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fakes.asgi_client import asgi_call
from fakes.byte_tokenizer import ByteTokenizer
from fakes.fake_engine import FakeEngine
from octavo_server.app import build_app
from octavo_server.openai.embeddings import EmbeddingRequest
from octavo_server.openai.ranking import RerankRequest, ScoreRequest
from octavo_server.openai.refused_fields import HINTS
from octavo_server.openai.request_types import ChatCompletionRequest, CompletionRequest
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SCORE, RERANK, GENERATE = "/score", "/rerank", "/v2/models/fake-model/generate"
USER = {"role": "user", "content": "Hello there"}
TOOL = {"type": "function", "function": {"name": "look_up"}}
CALL = '<tool_call>{"name": "look_up", "arguments": {}}</tool_call>'
ANSWER = f"<think>hm</think>Hello you{CALL}{CALL}"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 8},
    COMPLETIONS: {"prompt": "Hello there", "max_tokens": 8},
    EMBEDDINGS: {"input": "Hello there"},
    SCORE: {"queries": "a", "documents": ["b", "some longer text"]},
    RERANK: {"query": "a", "documents": ["b", "some longer text"]},
    GENERATE: {"text_input": "Hello there", "max_tokens": 8},
}

# field: a value that asks for something, and what must stand beside it for that
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "n": (2, {}),
    "temperature": (0.5, {}),
    "top_p": (0.5, {}),
    "top_k": (5, {}),
    "min_p": (0.1, {}),
    "typical_p": (0.9, {}),
    "repetition_penalty": (1.1, {}),
    "presence_penalty": (0.5, {}),
    "frequency_penalty": (0.5, {}),
    "logit_bias": ({"65": 3}, {}),
    "allowed_token_ids": ([65, 66], {}),
    "bad_words": (["Hello"], {}),
    "seed": (1, {}),
    "stop": ("lo", {}),
    "stop_token_ids": ([108], {}),
    "include_stop_str_in_output": (True, {"stop": "lo"}),
    "ignore_eos": (True, {}),
    "min_tokens": (3, {}),
    "skip_special_tokens": (False, {"max_tokens": 40}),
    "spaces_between_special_tokens": (True, {"skip_special_tokens": False}),
    "prompt_logprobs": (1, {}),
    "truncate_prompt_tokens": (3, {}),
    "truncation_side": ("right", {"truncate_prompt_tokens": 3}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "stream_interval": (4, {"stream": True, "max_tokens": 40}),
    "response_format": ({"type": "json_object"}, {}),
    "structured_outputs": ({"regex": "a+"}, {}),
    "guided_json": ({"type": "object"}, {}),
    "guided_regex": ("a+", {}),
    "guided_choice": (["a", "b"], {}),
    "guided_grammar": ('start: "a"', {}),
    "guided_whitespace_pattern": (" ?", {"guided_json": {"type": "object"}}),
    "return_token_ids": (True, {}),
    "cache_salt": ("mine", {}),
    "priority": (3, {}),
    "request_id": ("my-request", {}),
    "octavo_resume": ({"id": "x", "created": 1, "token_ids": [72]}, {"stream": True}),
    "use_beam_search": (True, {"n": 2}),
    "length_penalty": (0.5, {}),
    "early_stopping": (True, {}),
    "logprob_token_ids": ([1], {}),
    "repetition_detection": ({"max_pattern_size": 3}, {}),
    "thinking_token_budget": (10, {}),
    "watermarking": (True, {}),
    "kv_transfer_params": ({"a": 1}, {}),
    "ec_transfer_params": ({"a": 1}, {}),
    "vllm_xargs": ({"a": 1}, {}),
    "logits_processors": (["x"], {}),
    "prompt_embeds": ("AAAA", {}),
    "guided_decoding_backend": ("outlines", {}),
}
ONE_ROUTE: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    CHAT: {
        "model": ("no-such-model", {}),
        "max_tokens": (3, {}),
        "max_completion_tokens": (3, {}),
        "add_special_tokens": (True, {}),
        "logprobs": (True, {}),
        "top_logprobs": (2, {"logprobs": True}),
        "return_tokens_as_token_ids": (True, {"logprobs": True}),
        "return_prompt_text": (True, {}),
        "echo": (True, {}),
        "best_of": (2, {}),
        "add_generation_prompt": (False, {}),
        "continue_final_message": (True, {"messages": [USER, {"role": "assistant", "content": "So"}]}),
        "documents": ([{"text": "x"}], {}),
        "chat_template": ("{{ x }}", {}),
        "chat_template_kwargs": ({"a": 1}, {}),
        "media_io_kwargs": ({"image": {}}, {}),
        "mm_processor_kwargs": ({"a": 1}, {}),
        "reasoning_effort": ("high", {}),
        "include_reasoning": (False, {}),
        "tools": ([TOOL], {}),
        "tool_choice": ("required", {"tools": [TOOL]}),
        "parallel_tool_calls": (False, {"tools": [TOOL], "max_tokens": 400}),
        "functions": ([{"name": "f"}], {}),
        "function_call": ("auto", {}),
        "modalities": (["audio"], {}),
        "audio": ({"voice": "x"}, {}),
        "verbosity": ("low", {}),
        "web_search_options": ({"a": 1}, {}),
    },
    COMPLETIONS: {
        "model": ("no-such-model", {}),
        "max_tokens": (3, {}),
        "add_special_tokens": (False, {}),
        "logprobs": (1, {}),
        "return_tokens_as_token_ids": (True, {"logprobs": 1}),
        "return_prompt_text": (True, {}),
        "echo": (True, {}),
        "suffix": ("end", {}),
        "best_of": (2, {}),
    },
    EMBEDDINGS: {
        "model": ("no-such-model", {}),
        "messages": ([USER], {}),
        "encoding_format": ("base64", {}),
        "dimensions": (4, {}),
        "embed_dtype": ("float16", {}),
        "endianness": ("big", {}),
        "truncate_prompt_tokens": (3, {}),
        "truncation_side": ("left", {"truncate_prompt_tokens": 3}),
        "add_special_tokens": (False, {}),
        "use_activation": (False, {}),
        "priority": (3, {}),
        "request_id": ("mine", {}),
    },
    SCORE: {
        "instruction": ("find stones", {}),
        "model": ("no-such-model", {}),
        "text_1": (["x"], {"queries": None}),
        "text_2": (["y"], {"documents": None}),
        "truncate_prompt_tokens": (1, {}),
        "priority": (3, {}),
        "use_activation": (False, {}),
        "mm_processor_kwargs": ({"a": 1}, {}),
    },
    RERANK: {
        "instruction": ("find stones", {}),
        "model": ("no-such-model", {}),
        "top_n": (1, {}),
        "return_documents": (False, {}),
        "max_tokens_per_doc": (1, {}),
        "truncate_prompt_tokens": (1, {}),
        "priority": (3, {}),
        "use_activation": (False, {}),
        "mm_processor_kwargs": ({"a": 1}, {}),
    },
    GENERATE: {
        "max_tokens": (3, {}),
        "add_special_tokens": (False, {}),
        "logprobs": (1, {}),
        "echo": (True, {}),
        "best_of": (2, {}),
    },
}
NOT_IN_V2 = ("stream",)  # of `generate_stream`; `generate` answers whole whatever it says, as Triton's does
ROWS = [
    *((route, name) for route in (CHAT, COMPLETIONS, GENERATE) for name in SAMPLING
      if not (route == GENERATE and (name in NOT_IN_V2))),
    *((route, name) for route, fields in ONE_ROUTE.items() for name in fields),
]  # fmt: skip
NESTED = [
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"stream_interval": 4}, "stream_interval"),
    ({"truncation_side": "left"}, "truncation_side"),
    ({"request_id": "a b"}, "request_id"),
]


class Answering:
    """A replica whose template shows every variable it is given."""

    def __init__(self, task: str) -> None:
        self.engine = FakeEngine(task=task, reply=lambda prompt: ANSWER)
        settings = ServeSettings(
            model="fake", served_model_names=("fake-model",), tool_call_parser="hermes", reasoning_parser="think"
        )
        self.replica = Replica(settings, self.engine, lambda path: ShowingTokenizer())
        self._app = build_app(self.replica)

    async def ask(self, route: str, body: dict[str, Any]) -> tuple[int, Any, str]:
        """Status, the parsed answer, and all that a caller or the engine could notice."""
        self.engine.received.clear()
        status, _, answer = await asgi_call(self._app, "POST", route, json.dumps(body).encode())
        text = re.sub(r'"(id|created|call_id)":("[a-z]+-[0-9a-f]{32}"|"call_[0-9a-f]+"|\d+)', "", answer.decode())
        return status, answer, f"{status} {text} {list(self.engine.received.values())}"


class ShowingTokenizer(ByteTokenizer):
    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return super().apply_chat_template(messages, **options) + str(options.get("template_kwargs") or "")


async def served(route: str) -> Answering:
    target = Answering("embed" if route in (EMBEDDINGS, SCORE, RERANK) else "generate")
    await target.replica.start()
    return target


@pytest.mark.parametrize(("route", "name"), ROWS)
async def test_a_field_is_honoured_or_refused_by_name(route: str, name: str) -> None:
    value, beside = ONE_ROUTE[route].get(name) or SAMPLING[name]
    target = await served(route)
    base = {**BASE[route], **beside}

    _, _, without = await target.ask(route, base)
    status, answer, with_it = await target.ask(route, {**base, name: value})

    if status == 200:
        assert with_it != without, "accepted and ignored"
    else:
        error = json.loads(answer)["error"]
        assert status in (400, 404)
        assert name in (error if isinstance(error, str) else f"{error['param']} {error['message']}")


@pytest.mark.parametrize(("fields", "param"), NESTED)
async def test_options_of_options_are_not_ignored_either(fields: dict[str, Any], param: str) -> None:
    target = await served(CHAT)

    status, answer, _ = await target.ask(CHAT, {**BASE[CHAT], **fields})

    assert status == 400
    assert json.loads(answer)["error"]["param"] == param


@pytest.mark.parametrize("name", ["length_penalty", "thinking_token_budget", "modalities", "use_beam_search"])
async def test_a_refused_field_may_be_sent_when_it_asks_for_nothing(name: str) -> None:
    off = {"length_penalty": 1.0, "thinking_token_budget": -1, "modalities": ["text"], "use_beam_search": False}
    target = await served(CHAT)

    assert (await target.ask(CHAT, {**BASE[CHAT], name: off[name]}))[0] == 200


@pytest.mark.parametrize("name", sorted(HINTS))
async def test_a_hint_changes_nothing_and_is_not_counted_as_unknown(name: str) -> None:
    target = await served(CHAT)
    _, _, without = await target.ask(CHAT, BASE[CHAT])
    before = _ignored(target)

    _, _, with_it = await target.ask(CHAT, {**BASE[CHAT], name: "x"})

    assert with_it == without
    assert _ignored(target) == before


def test_no_field_of_a_request_is_missing_in_this_table() -> None:
    needed = {
        CHAT: {*ChatCompletionRequest.__struct_fields__} - {"messages"},
        COMPLETIONS: {*CompletionRequest.__struct_fields__} - {"prompt"},
        EMBEDDINGS: {*EmbeddingRequest.__struct_fields__} - {"input"},
        SCORE: {*ScoreRequest.__struct_fields__} - {"queries", "documents"},
        RERANK: {*RerankRequest.__struct_fields__} - {"query", "documents"},
    }
    for route, names in needed.items():
        assert names <= {name for path, name in ROWS if path == route}, route


def _ignored(target: Answering) -> str:
    lines = target.replica.metrics.render().decode().splitlines()
    (line,) = [line for line in lines if line.startswith("octavo_ignored_request_fields_total")]
    return line
