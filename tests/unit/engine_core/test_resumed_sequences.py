"""A sequence that goes on from tokens generated elsewhere ends as if it had never stopped."""

from __future__ import annotations

import json
from random import Random

import pytest

from char_tokenizer import CharTokenizer
from fake_runner import EOS, FakeRunner
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import InvalidRequestError
from octavo_engine.messages import AddRequest, FinishReason, SequenceOutput
from octavo_engine.sampling_params import SamplingParams, StructuredOutput

PROMPT = [1, 2, 3, 4, 5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def engine(**settings: object) -> EngineCore:
    config = EngineConfig(
        **{"model": "fake", "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}
    )
    return EngineCore(FakeRunner(num_blocks=256), config, tokenizer=CharTokenizer)


def run(core: EngineCore, *requests: AddRequest) -> dict[str, list[SequenceOutput]]:
    for request in requests:
        core.add(request)
    outputs: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    for _ in range(5_000):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs[output.request_id].append(output)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.7, "seed": 5, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 0.0, "frequency_penalty": 1.5, "min_tokens": 30, "logit_bias": {EOS: 50.0}},
        {"temperature": 0.9, "seed": 2, "bad_words_ids": [[1], [3, 4]]},
    ],
)
@pytest.mark.parametrize("speculates", [0, 3])
def test_cut_anywhere_the_rest_is_the_same(sampling: dict[str, object], speculates: int) -> None:
    params = SamplingParams(**{"max_tokens": 40, **sampling})
    (whole,) = run(engine(), AddRequest(request_id="a", prompt_token_ids=PROMPT, sampling=params)).values()
    expected = tokens(whole)
    rng = Random(1)
    cuts = sorted({1, len(expected) - 1, *(rng.randrange(1, len(expected)) for _ in range(6))})
    other = engine(num_speculative_tokens=speculates)
    resumed = run(
        other,
        *(
            AddRequest(
                request_id=f"cut-{cut}", prompt_token_ids=PROMPT, output_token_ids=expected[:cut], sampling=params
            )
            for cut in cuts
        ),
    )

    assert {cut: tokens(resumed[f"cut-{cut}"]) for cut in cuts} == {cut: expected[cut:] for cut in cuts}
    assert {out[-1].finish_reason for out in resumed.values()} == {whole[-1].finish_reason}
    assert other.stats().generation_tokens == sum(len(expected) - cut for cut in cuts)
    assert other.stats().prompt_tokens == len(PROMPT) * len(cuts)
    assert other.pool.num_used == 0


def test_a_grammar_is_followed_from_where_it_was() -> None:
    params = SamplingParams(
        max_tokens=200, temperature=1.0, seed=4, structured=StructuredOutput(json_schema=json.dumps(SCHEMA))
    )
    (whole,) = run(engine(), AddRequest(request_id="a", prompt_token_ids=PROMPT, sampling=params)).values()
    expected = tokens(whole)
    for cut in range(1, len(expected) - 1, 5):
        request = AddRequest(request_id="b", prompt_token_ids=PROMPT, output_token_ids=expected[:cut], sampling=params)
        assert tokens(run(engine(), request)["b"]) == expected[cut:]
    assert set(json.loads(CharTokenizer().decode(expected))) == {"name", "age"}


def test_what_has_ended_does_not_go_on() -> None:
    core = engine()
    for output, sampling in (([5, 6, 7], {"max_tokens": 3}), ([5, EOS], {}), ([5, 9], {"stop_token_ids": (9,)})):
        request = AddRequest(
            request_id="a", prompt_token_ids=PROMPT, output_token_ids=output,
            sampling=SamplingParams(**{"max_tokens": 10, **sampling}),
        )  # fmt: skip
        with pytest.raises(InvalidRequestError, match="already ended"):
            core.add(request)
    with pytest.raises(InvalidRequestError, match="token ids"):
        core.add(
            AddRequest(request_id="a", prompt_token_ids=PROMPT, output_token_ids=[10_000], sampling=SamplingParams())
        )
    assert not core.has_work
    assert core.stats().requests_finished[FinishReason.ERROR.value] == 0
