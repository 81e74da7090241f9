"""Whether and how far to guess ahead, for each sequence in each step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Items

from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel
from octavo_engine.speculation.draft import FIRST_ACCEPTANCE, Draft
from octavo_engine.speculation.proposer import Proposer

_WEIGHT = 0.1
_PRIOR_WEIGHT = 0.01
_RECOVERY = 0.002
_UNKNOWN_THRESHOLD = 0.3


class Speculator:
    """Asks for guesses while they pay, and stops by itself when they do not.

    A guess that is accepted with probability p adds p tokens to a step, the time of one token of prefill, and its part
    of the time that guessing took. In a step of n sequences that takes T seconds that pays while
    p > n * (seconds_per_token + seconds_per_guess) / T, by the same step-time model that cuts prefill chunks: at small
    batches almost always, in a compute-bound batch never. p is learned for each sequence, and begins where those
    before it have been; the i-th guess in a row is accepted with about p^i.
    """

    def __init__(self, max_tokens: int, model: StepTimeModel, proposer: Proposer) -> None:
        self.max_tokens = max_tokens
        self.proposer = proposer
        self.num_drafts = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.accepted_by_position: Counter[int] = Counter()
        self._model = model
        self._prior = FIRST_ACCEPTANCE

    def count(self, seq: Sequence, num_running: int) -> int:
        """How many tokens to guess after the last one, see `length`; what does not pay is tried again later."""
        if seq.draft is None:
            seq.draft = Draft(self._prior)
        count = self.length(seq, num_running)
        if not count:
            seq.draft.acceptance += _RECOVERY * (0.5 - seq.draft.acceptance)
        return count

    def length(self, seq: Sequence, num_running: int) -> int:
        """The longest guess after the last token that pays; 0 when none does or the sequence cannot be verified.

        Sequences whose next logits depend on the tokens before them (penalties, bad words, grammars) are left alone.
        """
        if seq.sampler.has_processors or self.proposer.unavailable:
            return 0
        acceptance = self._prior if seq.draft is None else seq.draft.acceptance
        room = seq.max_length - seq.length - 1
        return max(0, min(room, self.max_tokens, self._paying_length(acceptance, num_running)))

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[list[int]]:
        """Guesses for each sequence, at most as many as wanted."""
        return self.proposer.propose(wanted) if wanted else []

    def forget(self, seq: Sequence) -> None:
        """The sequence runs no more."""
        self.proposer.forget(seq)

    def observe(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Learn from a verified draft: every accepted token is a success, the first refused one a failure."""
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.accepted_by_position.update(range(num_accepted))
        for index in range(min(num_drafted, num_accepted + 1)):
            outcome = index < num_accepted
            self._prior += _PRIOR_WEIGHT * (outcome - self._prior)
            if seq.draft is not None:
                seq.draft.acceptance += _WEIGHT * (outcome - seq.draft.acceptance)

    def _paying_length(self, acceptance: float, num_running: int) -> int:
        """The longest draft whose last token is still accepted often enough."""
        threshold = _UNKNOWN_THRESHOLD
        if self._model.is_ready:
            step_s = self._model.predict(StepLoad(num_running))
            cost_s = self._model.seconds_per_token + self.proposer.seconds_per_guess(num_running)
            threshold = num_running * cost_s / step_s if step_s > 0 else _UNKNOWN_THRESHOLD
        threshold = min(0.99, max(0.05, threshold))
        if acceptance >= 0.999:
            return 0 if threshold >= 0.99 else self.max_tokens
        return int(math.log(threshold) / math.log(max(acceptance, 1e-6)))
