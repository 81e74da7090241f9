"""Beam search over the HTTP API's own path finds what the offline search finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from char_tokenizer import CharTokenizer
from fake_runner import EOS, FakeRunner
from octavo_engine.beam_search import BeamSearchParams
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.llm import LLM
from octavo_engine.messages import AddRequest, ModelInfo, SequenceOutput
from octavo_engine.sampling_params import SamplingParams
from octavo_server.beams import BeamSearcher
from octavo_server.caller import Caller
from octavo_server.errors import ApiError
from octavo_server.generation import Delta, SequenceRequest

PROMPTS = [[1, 2, 3], [7, 8]]


class CoreEngine:
    """An engine core stepped by whoever waits for it."""

    def __init__(self) -> None:
        self.core = EngineCore(FakeRunner(num_blocks=200), EngineConfig(model="fake"))
        self._outputs: dict[str, list[SequenceOutput]] = {}

    @property
    def model(self) -> ModelInfo:
        return self.core.model

    async def generate(self, **request: Any) -> AsyncIterator[SequenceOutput]:
        name = request["request_id"]
        self._outputs[name] = []
        self.core.add(AddRequest(**request))
        try:
            while True:
                await asyncio.sleep(0)
                for output in self.core.step().outputs if not self._outputs[name] else ():
                    self._outputs[output.request_id].append(output)
                while self._outputs[name]:
                    output = self._outputs[name].pop(0)
                    yield output
                    if output.finish_reason is not None:
                        return
        finally:
            self.core.abort([name])


def requests(width: int, max_tokens: int) -> list[SequenceRequest]:
    sampling = SamplingParams(max_tokens=max_tokens)
    return [
        SequenceRequest(i * width + k, f"r{i}-{k}", prompt, sampling, Caller())
        for i, prompt in enumerate(PROMPTS)
        for k in range(width)
    ]


@pytest.mark.parametrize(("width", "length_penalty"), [(1, 1.0), (3, 1.0), (4, 0.2)])
async def test_the_beams_are_those_of_the_offline_search(width: int, length_penalty: float) -> None:
    engine = CoreEngine()
    searcher = BeamSearcher(engine, CharTokenizer())  # type: ignore[arg-type]
    stream = await searcher.start(requests(width, 6), width, length_penalty)
    found: list[Delta] = [delta async for delta in stream]

    llm = LLM("fake", load=lambda _config, _progress: FakeRunner(num_blocks=200), tokenizer=CharTokenizer())
    params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=length_penalty)
    expected = [beam for result in llm.beam_search(PROMPTS, params) for beam in result.outputs]
    assert [delta.index for delta in found] == list(range(2 * width))
    assert [delta.token_ids for delta in found] == [beam.token_ids for beam in expected]
    assert [delta.finish_reason for delta in found] == [beam.finish_reason for beam in expected]
    assert all(delta.token_ids[-1] == EOS or len(delta.token_ids) == 6 for delta in found)
    assert engine.core.pool.num_used == 0


async def test_a_search_that_is_closed_leaves_nothing_behind() -> None:
    engine = CoreEngine()
    searching = asyncio.create_task(
        BeamSearcher(engine, CharTokenizer()).start(requests(4, 200), 4, 1.0)  # type: ignore[arg-type]
    )
    for _ in range(20):
        await asyncio.sleep(0)
    searching.cancel()
    await asyncio.gather(searching, return_exceptions=True)
    assert engine.core.scheduler.num_running == engine.core.scheduler.num_waiting == 0
    assert engine.core.pool.num_used == 0


async def test_too_many_beams_are_refused_by_the_field_that_asks_for_them() -> None:
    with pytest.raises(ApiError, match="n: must be between 1 and 10, got 11 with use_beam_search") as caught:
        await BeamSearcher(CoreEngine(), CharTokenizer()).start(requests(11, 4), 11, 1.0)  # type: ignore[arg-type]
    assert caught.value.param == "n"
