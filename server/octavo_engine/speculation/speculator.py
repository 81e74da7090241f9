"""Whether and how far to guess ahead, for each sequence in each step."""

from __future__ import annotations

import math

from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel
from octavo_engine.speculation.draft import Draft

_WEIGHT = 0.1
_RECOVERY = 0.002
_UNKNOWN_THRESHOLD = 0.3


class Speculator:
    """Proposes drafts while they pay, and stops by itself when they do not.

    A draft token that is accepted with probability p adds p tokens to a step and the time of one token of prefill. In
    a step of n sequences that takes T seconds that pays while p > n * seconds_per_token / T, by the same step-time
    model that cuts prefill chunks: at small batches almost always, in a compute-bound batch never. p is learned for
    each sequence; the i-th draft token is accepted with about p^i.
    """

    def __init__(self, max_tokens: int, model: StepTimeModel, max_model_len: int) -> None:
        self.max_tokens = max_tokens
        self.num_drafted = 0
        self.num_accepted = 0
        self._model = model
        self._max_model_len = max_model_len

    def propose(self, seq: Sequence, num_running: int) -> list[int]:
        """Tokens to verify after the last one; [] when guessing does not pay or the sequence cannot be verified.

        Sequences whose next logits depend on the tokens before them (penalties, bad words, grammars) are left alone.
        """
        if seq.sampler.has_processors:
            return []
        state = seq.draft
        if state is None:
            state = seq.draft = Draft()
        room = min(seq.sampling.max_tokens - seq.num_output_tokens, self._max_model_len - len(seq.tokens)) - 1
        count = min(room, self.max_tokens, self._paying_length(state.acceptance, num_running))
        if count < 1:
            state.acceptance += _RECOVERY * (0.5 - state.acceptance)
            return []
        return state.index.propose(seq.tokens, count)

    def observe(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Learn from a verified draft: every accepted token is a success, the first refused one a failure."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if seq.draft is None:
            return
        for index in range(min(num_drafted, num_accepted + 1)):
            seq.draft.acceptance += _WEIGHT * ((index < num_accepted) - seq.draft.acceptance)

    def _paying_length(self, acceptance: float, num_running: int) -> int:
        """The longest draft whose last token is still accepted often enough."""
        threshold = _UNKNOWN_THRESHOLD
        if self._model.is_ready:
            step_s = self._model.predict(StepLoad(num_running))
            threshold = num_running * self._model.seconds_per_token / step_s if step_s > 0 else _UNKNOWN_THRESHOLD
        threshold = min(0.99, max(0.05, threshold))
        if acceptance >= 0.999:
            return self.max_tokens
        return int(math.log(threshold) / math.log(max(acceptance, 1e-6)))
