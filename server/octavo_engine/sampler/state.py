"""What the sampler must know of one sequence."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import torch

from octavo_engine.errors import OctavoError
from octavo_engine.sampling_params import SamplingParams

GREEDY_TEMPERATURE = 1e-5


class TokenConstraint(Protocol):
    """A language that a sequence's output must belong to, at the place the output has reached."""

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""

    def mask(self, row: torch.Tensor) -> None:
        """Exclude from `row` ([vocab_size] float32) every token that cannot come next. Raises `InvalidRequestError`."""

    def accept(self, token: int) -> None:
        """Move on past a chosen token. Raises `InvalidRequestError` when nothing more can be followed."""


class SamplerState:
    """Parameters, seed and token history of one sequence; `tokens` is the sequence's own growing list.

    `failure` says why the sequence cannot go on, once that is so.
    """

    __slots__ = (
        "_num_counted",
        "constraint",
        "end_token_ids",
        "failure",
        "has_processors",
        "is_greedy",
        "num_prompt_tokens",
        "output_counts",
        "params",
        "seed",
        "tokens",
    )

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        tokens: list[int],
        num_prompt_tokens: int,
        end_token_ids: frozenset[int] = frozenset(),
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.params = params
        self.seed = seed
        self.tokens = tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.end_token_ids = sorted(end_token_ids | set(params.stop_token_ids))
        self.constraint = constraint
        self.failure: OctavoError | None = None
        self.is_greedy = params.temperature < GREEDY_TEMPERATURE
        self.has_processors = self.has_penalties or bool(
            params.logit_bias or params.allowed_token_ids or params.bad_words_ids or params.min_tokens or constraint
        )
        self.output_counts: Counter[int] = Counter()
        self._num_counted = num_prompt_tokens

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def count_output(self) -> Counter[int]:
        """How often each token was generated so far."""
        if self._num_counted < len(self.tokens):
            self.output_counts.update(self.tokens[self._num_counted :])
            self._num_counted = len(self.tokens)
        return self.output_counts
