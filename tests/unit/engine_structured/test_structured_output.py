"""Output that must belong to a language does, for any model, and a wrong grammar hurts its own request alone."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from char_tokenizer import CharTokenizer
from fake_runner import FakeRunner, greedy
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import InvalidRequestError
from octavo_engine.messages import AddRequest, FinishReason, SequenceOutput
from octavo_engine.sampling_params import MAX_GRAMMAR_CHARS, SamplingParams, StructuredOutput
from octavo_engine.structured.grammar import MAX_CACHED, GrammarCompiler

TOKENIZER = CharTokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def engine(**settings: object) -> EngineCore:
    config = EngineConfig(**{"model": "fake", "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings})
    return EngineCore(FakeRunner(num_blocks=256), config, tokenizer=lambda: TOKENIZER)


def request(name: str, structured: StructuredOutput | None, **sampling: object) -> AddRequest:
    params = SamplingParams(**{"max_tokens": 200, "temperature": 0.0, "structured": structured, **sampling})
    return AddRequest(request_id=name, prompt_token_ids=[1, len(name), 3], sampling=params)


def run(core: EngineCore) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {}
    for _ in range(5_000):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not become idle")


def text(outputs: list[SequenceOutput]) -> str:
    return TOKENIZER.decode([token for output in outputs for token in output.token_ids])


def generate(structured: StructuredOutput, **sampling: object) -> tuple[str, SequenceOutput]:
    core = engine()
    core.add(request("a", structured, **sampling))
    outputs = run(core)["a"]
    return text(outputs), outputs[-1]


@pytest.mark.parametrize("seed", range(6))
def test_a_json_schema_is_kept(seed: int) -> None:
    answer, last = generate(StructuredOutput(json_schema=json.dumps(SCHEMA)), temperature=1.0, seed=seed)
    assert last.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(answer), SCHEMA)


def test_a_regex_covers_the_whole_output() -> None:
    answer, last = generate(StructuredOutput(regex=r"[a-c]{3}-[0-9]{2}"))
    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", answer)
    assert last.finish_reason is FinishReason.STOP


def test_a_choice_is_one_of_the_choices() -> None:
    choices = ('say "no"', "yes", "maybe\\so")
    assert generate(StructuredOutput(choice=choices))[0] in choices


def test_a_grammar_in_lark_notation_is_kept() -> None:
    answer, _ = generate(StructuredOutput(grammar='start: "(" ("+" | "-")~2..3 ")"'))
    assert re.fullmatch(r"\([+-]{2,3}\)", answer)


def test_any_json_object_is_an_object() -> None:
    answer, last = generate(StructuredOutput(json_object=True), logit_bias={TOKENIZER.encode("}")[0]: 50.0})
    assert last.finish_reason is FinishReason.STOP
    assert isinstance(json.loads(answer), dict)


def test_free_and_constrained_requests_share_a_batch() -> None:
    core = engine()
    for i in range(4):
        core.add(request(f"free{i}", None, max_tokens=20))
        core.add(request(f"bound{i}", StructuredOutput(regex=f"x{{{i + 1}}}")))
    out = run(core)
    for i in range(4):
        assert [t for o in out[f"free{i}"] for t in o.token_ids] == greedy([1, 5, 3], 20)
        assert text(out[f"bound{i}"]) == "x" * (i + 1)


def test_a_preempted_constrained_sequence_goes_on_where_it_was() -> None:
    core = EngineCore(
        FakeRunner(num_blocks=12, max_model_len=48),
        EngineConfig(model="fake", max_num_seqs=6, max_num_batched_tokens=16, enable_prefix_caching=False),
        tokenizer=lambda: TOKENIZER,
    )
    for i in range(6):
        core.add(request(f"r{i}", StructuredOutput(regex="[ab]{20}")))
    out = run(core)
    assert core.scheduler.num_preemptions > 0
    assert all(re.fullmatch("[ab]{20}", text(out[f"r{i}"])) for i in range(6))


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(regex="(unclosed"),
        StructuredOutput(grammar="start: missing"),
        StructuredOutput(json_schema='{"type": "object"'),
        StructuredOutput(json_schema='{"type": "no-such-type"}'),
        StructuredOutput(json_schema='{"type": "object", "unevaluatedProperties": false}'),
        StructuredOutput(json_schema="[" * 20_000),
    ],
)
def test_a_wrong_grammar_is_refused_with_its_field_and_others_go_on(structured: StructuredOutput) -> None:
    core = engine()
    core.add(request("wrong", structured))
    core.add(request("good", None, max_tokens=20))
    out = run(core)
    assert out["wrong"][-1].error_kind == "InvalidRequestError"
    assert out["wrong"][-1].error_param == "structured"
    assert "structured." in (out["wrong"][-1].error or "")
    assert [t for o in out["good"] for t in o.token_ids] == greedy([1, 4, 3], 20)


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(json_schema='{"type": "string", "pattern": "^(a+)+$", "minLength": 5000}'),
        StructuredOutput(regex="((a{1,500}){1,500}){1,500}"),
        StructuredOutput(json_schema='{"$ref": "#"}'),
        StructuredOutput(grammar='start: a\na: a a | "x"'),
    ],
)
def test_a_hostile_grammar_is_bounded_and_ends_at_most_its_own_request(structured: StructuredOutput) -> None:
    core = engine()
    core.add(request("hostile", structured, max_tokens=40))
    core.add(request("good", None, max_tokens=20))
    out = run(core)
    last = out["hostile"][-1]
    assert last.finish_reason is not None
    assert last.finish_reason is not FinishReason.ERROR or "structured" in (last.error or "")
    assert [t for o in out["good"] for t in o.token_ids] == greedy([1, 4, 3], 20)


def test_a_request_can_be_aborted_while_its_grammar_compiles() -> None:
    core = engine()
    core.add(request("a", StructuredOutput(regex="a+")))
    core.abort(["a"])
    assert not core.has_work


@pytest.mark.parametrize(
    ("structured", "match"),
    [
        (StructuredOutput(), "got none"),
        (StructuredOutput(regex="a", json_object=True), "got regex, json_object"),
        (StructuredOutput(regex="a" * (MAX_GRAMMAR_CHARS + 1)), "at most"),
        (StructuredOutput(choice=()), "1 to"),
        (StructuredOutput(choice=("a", "")), "empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(structured: StructuredOutput, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        engine().add(request("a", structured))


def test_the_cache_of_grammars_is_bounded_and_copies_are_independent() -> None:
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids)
    first = compiler.compile(StructuredOutput(regex="ab"))
    first.accept(TOKENIZER.encode("a")[0])
    second = compiler.compile(StructuredOutput(regex="ab"))
    with pytest.raises(InvalidRequestError, match="cannot be followed"):
        second.accept(TOKENIZER.encode("b")[0])
    for i in range(3 * MAX_CACHED):
        compiler.compile(StructuredOutput(regex=f"a{{{i + 1}}}"))
    assert len(compiler._cache) == MAX_CACHED
