"""Beam search as a loop around the engine: every step extends each beam by one token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from octavo_engine.errors import InvalidRequestError
from octavo_engine.messages import TokenLogprobs
from octavo_engine.sampling_params import MAX_LOGPROBS


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """`beam_width` beams of at most `max_tokens` tokens; a score is `cumulative_logprob / length ** length_penalty`."""

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False

    def validate(self) -> None:
        """Raise `InvalidRequestError` naming the first field out of range."""
        widest = MAX_LOGPROBS // 2
        if not 1 <= self.beam_width <= widest:
            raise InvalidRequestError(
                f"beam_width: must be between 1 and {widest}, got {self.beam_width}", "beam_width"
            )
        if self.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens: must be at least 1, got {self.max_tokens}", "max_tokens")


@dataclass(frozen=True, slots=True)
class Beam:
    """Tokens after the prompt and the sum of their log-probabilities."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0

    def score(self, length_penalty: float) -> float:
        return float(self.cumulative_logprob / max(1, len(self.token_ids)) ** length_penalty)


NextTokens = Callable[[Sequence[Beam]], list[TokenLogprobs]]


class BeamSearch:
    """The search as a value: ask the model about `beams`, `extend` them by its answers, until it is done."""

    def __init__(self, params: BeamSearchParams, eos_token_ids: frozenset[int]) -> None:
        self.beams = [Beam()]
        self._params = params
        self._ends = frozenset() if params.ignore_eos else eos_token_ids
        self._finished: list[Beam] = []
        self._num_steps = 0

    @property
    def is_done(self) -> bool:
        """No beam can grow any more, or none that can would get among the best."""
        if not self.beams or self._num_steps >= self._params.max_tokens:
            return True
        return self._num_steps > 0 and _is_decided(self.beams, self._finished, self._params)

    def extend(self, entries: Sequence[TokenLogprobs]) -> None:
        """entries: for each beam the model's `2 * beam_width` most likely next tokens, enough to fill every beam even
        if half of them end."""
        width, ends = self._params.beam_width, self._ends
        candidates = [
            Beam((*beam.token_ids, token), beam.cumulative_logprob + logprob)
            for beam, entry in zip(self.beams, entries, strict=True)
            for token, logprob in entry.top
        ]
        candidates.sort(key=lambda beam: -beam.cumulative_logprob)
        self._finished += [beam for beam in candidates[:width] if beam.token_ids[-1] in ends]
        self.beams = [beam for beam in candidates if beam.token_ids[-1] not in ends][:width]
        self._num_steps += 1

    def best(self) -> list[Beam]:
        """The best `beam_width` beams, best first."""
        ranked = sorted([*self._finished, *self.beams], key=lambda beam: -beam.score(self._params.length_penalty))
        return ranked[: self._params.beam_width]


def search(next_tokens: NextTokens, params: BeamSearchParams, eos_token_ids: frozenset[int]) -> list[Beam]:
    """The best `beam_width` beams, best first; `next_tokens` returns for each beam what `BeamSearch.extend` takes."""
    state = BeamSearch(params, eos_token_ids)
    while not state.is_done:
        state.extend(next_tokens(state.beams))
    return state.best()


def _is_decided(beams: list[Beam], finished: list[Beam], params: BeamSearchParams) -> bool:
    """Whether no running beam can still reach the worst of enough finished ones."""
    if len(finished) < params.beam_width:
        return False
    worst = sorted((beam.score(params.length_penalty) for beam in finished), reverse=True)[params.beam_width - 1]
    length = params.max_tokens if params.length_penalty > 0 else len(beams[0].token_ids)
    best_possible = max(beam.cumulative_logprob for beam in beams) / max(1, length) ** params.length_penalty
    return bool(best_possible <= worst)
