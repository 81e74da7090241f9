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


def search(next_tokens: NextTokens, params: BeamSearchParams, eos_token_ids: frozenset[int]) -> list[Beam]:
    """The best `beam_width` beams, best first.

    `next_tokens` returns for each beam the model's `2 * beam_width` most likely next tokens: enough to fill every
    beam even if half of them end.
    """
    ends = frozenset() if params.ignore_eos else eos_token_ids
    beams, finished = [Beam()], list[Beam]()
    for _ in range(params.max_tokens):
        candidates = [
            Beam((*beam.token_ids, token), beam.cumulative_logprob + logprob)
            for beam, entry in zip(beams, next_tokens(beams), strict=True)
            for token, logprob in entry.top
        ]
        candidates.sort(key=lambda beam: -beam.cumulative_logprob)
        finished += [beam for beam in candidates[: params.beam_width] if beam.token_ids[-1] in ends]
        beams = [beam for beam in candidates if beam.token_ids[-1] not in ends][: params.beam_width]
        if not beams or _is_decided(beams, finished, params):
            break
    ranked = sorted([*finished, *beams], key=lambda beam: -beam.score(params.length_penalty))
    return ranked[: params.beam_width]


def _is_decided(beams: list[Beam], finished: list[Beam], params: BeamSearchParams) -> bool:
    """Whether no running beam can still reach the worst of enough finished ones."""
    if len(finished) < params.beam_width:
        return False
    worst = sorted((beam.score(params.length_penalty) for beam in finished), reverse=True)[params.beam_width - 1]
    length = params.max_tokens if params.length_penalty > 0 else len(beams[0].token_ids)
    best_possible = max(beam.cumulative_logprob for beam in beams) / max(1, length) ** params.length_penalty
    return bool(best_possible <= worst)
