"""Beam search for callers of the HTTP API: one token a step of every beam, together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import msgspec

from octavo_engine.beam_search import Beam, BeamSearch, BeamSearchParams
from octavo_engine.client import EngineClient
from octavo_engine.detokenizer import IncrementalDetokenizer
from octavo_engine.errors import OctavoError
from octavo_engine.messages import FinishReason, TokenLogprobs
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.errors import ApiError, bad_request, from_engine_error
from octavo_server.generation import Delta, DeltaStream, SequenceRequest, raise_failure


class BeamSearcher:
    """Runs searches on an engine. What the beams of a prompt share comes from its prefix cache."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    async def start(self, requests: Sequence[SequenceRequest], width: int, length_penalty: float) -> DeltaStream:
        """`width` beams for each prompt, whose requests lie side by side; a beam is one delta, told when its prompt's
        search is over, best first. Closing the stream ends the searches. Raises `ApiError`."""
        prompts = requests[::width]
        for request in prompts:
            _check(self._params(request, width, length_penalty))
        deltas = self._deltas(prompts, width, length_penalty)
        try:
            return DeltaStream(await anext(deltas), deltas)
        except BaseException:
            await deltas.aclose()
            raise

    async def _deltas(
        self, prompts: Sequence[SequenceRequest], width: int, length_penalty: float
    ) -> AsyncGenerator[Delta, None]:
        for request in prompts:
            beams = await self._search(request, self._params(request, width, length_penalty))
            for rank, beam in enumerate(beams):
                yield self._delta(request, request.index + rank, beam)

    async def _search(self, request: SequenceRequest, params: BeamSearchParams) -> list[Beam]:
        search = BeamSearch(params, frozenset(self._engine.model.eos_token_ids))
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2 * params.beam_width, ignore_eos=True)
        while not search.is_done:
            asking = [
                asyncio.create_task(self._ask(request, sampling, beam, f"{len(beam.token_ids)}-{place}"))
                for place, beam in enumerate(search.beams)
            ]
            try:
                search.extend(await asyncio.gather(*asking))
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return search.best()

    async def _ask(self, request: SequenceRequest, sampling: SamplingParams, beam: Beam, suffix: str) -> TokenLogprobs:
        caller = request.caller
        left_s = None if caller.deadline_s is None else caller.deadline_s - (time.monotonic() - caller.arrived_at)
        outputs = self._engine.generate(
            request_id=f"{request.request_id}-{suffix}",
            prompt_token_ids=[*request.prompt_token_ids, *beam.token_ids],
            sampling=sampling,
            tenant=caller.tenant,
            cache_salt=request.cache_salt,
            priority=request.priority,
            deadline_s=None if left_s is None else max(0.001, left_s),
            adapter=request.adapter,
        )
        entry = None
        try:
            async for output in outputs:
                raise_failure(output)
                entry = output.logprobs[0] if output.logprobs else entry
        except OctavoError as error:
            raise from_engine_error(error) from error
        if entry is None:
            raise ApiError(500, "This request could not be computed; others are not affected.", reason="engine_error")
        return entry

    def _params(self, request: SequenceRequest, width: int, length_penalty: float) -> BeamSearchParams:
        sampling = request.sampling
        return BeamSearchParams(
            beam_width=width,
            max_tokens=sampling.max_tokens,
            length_penalty=length_penalty,
            ignore_eos=sampling.ignore_eos,
        )

    def _delta(self, request: SequenceRequest, index: int, beam: Beam) -> Delta:
        ended = beam.token_ids[-1] in self._engine.model.eos_token_ids and not request.sampling.ignore_eos
        plain = msgspec.structs.replace(request.sampling, stop=())
        detokenizer = IncrementalDetokenizer(self._tokenizer, plain, continues_prompt=request.continues_prompt)
        text = detokenizer.push(list(beam.token_ids), True).text
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        return Delta(index=index, text=text, token_ids=list(beam.token_ids), finish_reason=reason)


def _check(params: BeamSearchParams) -> None:
    try:
        params.validate()
    except OctavoError as error:
        raise bad_request(f"n: {str(error).partition(': ')[2]} with use_beam_search", "n") from error
