"""Whether and how far to guess ahead, for each sequence in each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel
from octavo_engine.speculation.acceptance import Acceptance
from octavo_engine.speculation.draft import Draft
from octavo_engine.speculation.payoff import Candidate, Choice, Payoff
from octavo_engine.speculation.proposer import Proposer

_FIRST_ACCEPTANCE = 0.7
_FIRST_WEIGHT = 2.0  # in guesses


@dataclass(frozen=True, slots=True)
class GuessingRound:
    """What was decided for one step: over `num_sequences` that decode and read `context` KV positions, `num_guesses`
    are verified, which took `guess_s` to make."""

    choice: Choice
    num_sequences: int
    context: int
    num_guesses: int
    guess_s: float


class Speculator:
    """Asks for guesses while they pay, and stops by itself when they do not, see `Payoff`.

    How often a guess is accepted is learned for each sequence, and begins where those before it have been. Sequences
    whose next logits depend on the tokens before them (penalties, bad words, grammars) are left alone.
    """

    def __init__(self, max_tokens: int, model: StepTimeModel, proposer: Proposer, clock: Callable[[], float]) -> None:
        self.max_tokens = max_tokens
        self.proposer = proposer
        self.num_drafts = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.accepted_by_position: Counter[int] = Counter()
        self._clock = clock
        self._model = model
        self.payoff = Payoff(max_tokens, model, proposer.seconds)
        self._usual = Acceptance(_FIRST_ACCEPTANCE, _FIRST_WEIGHT)

    def wants(self, decoding: Items[Sequence], max_guesses: int) -> bool:
        """Whether there would be guesses for some of these, once the tokens that are being chosen are known."""
        candidates = self._candidates(decoding, max_guesses)
        return bool(candidates) and any(self._choose(decoding, candidates).counts)

    def guess(self, decoding: Items[Sequence], max_guesses: int) -> GuessingRound:
        """Set what is `drafted` for each of the sequences that decode in the next step, at most so much in all."""
        candidates = self._candidates([seq for seq in decoding if not seq.num_pending], max_guesses)
        choice = self._choose(decoding, candidates)
        wanted: list[tuple[Sequence, int]] = []
        for seq, count in zip(candidates, choice.counts, strict=True):
            if seq.draft is None:
                seq.draft = Draft(Acceptance(self._usual.mean, _FIRST_WEIGHT))
            if count:
                wanted.append((seq, count))
        for seq in decoding:
            seq.drafted = []
        started = self._clock()
        num_guesses = 0
        for (seq, _), drafted in zip(wanted, self.proposer.propose(wanted) if wanted else (), strict=True):
            seq.drafted = drafted
            num_guesses += len(drafted)
        self.payoff.covered(sum(choice.counts), num_guesses)
        context = sum(seq.num_launched for seq in decoding)
        return GuessingRound(choice, len(decoding), context, num_guesses, self._clock() - started)

    def observe_round(self, done: GuessingRound, load: StepLoad, step_s: float) -> None:
        """Learn what a round took, whose step computed `load` in `step_s`; prefills in it are set aside."""
        alone = StepLoad(done.num_sequences + done.num_guesses, done.context, 0, done.num_guesses)
        if load.num_tokens > alone.num_tokens and (whole_s := self._model.predict(load)) > 0.0:
            step_s *= min(1.0, self._model.predict(alone) / whole_s)
        self.payoff.observe(done.choice, done.num_sequences, done.num_guesses, step_s, done.guess_s)

    def observe(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Learn from a verified draft: every accepted token is a success, the first refused one a failure."""
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.accepted_by_position.update(range(num_accepted))
        for index in range(min(num_drafted, num_accepted + 1)):
            self._usual.observe(index < num_accepted)
            if seq.draft is not None:
                seq.draft.acceptance.observe(index < num_accepted)

    def forget(self, seq: Sequence) -> None:
        """The sequence runs no more."""
        self.proposer.forget(seq)

    def _choose(self, decoding: Items[Sequence], candidates: list[Sequence]) -> Choice:
        known = [self._usual if seq.draft is None else seq.draft.acceptance for seq in candidates]
        weighed = [Candidate(a.mean, a.upper, self._room(seq)) for a, seq in zip(known, candidates, strict=True)]
        return self.payoff.choose(weighed, len(decoding))

    def _candidates(self, decoding: Items[Sequence], max_guesses: int) -> list[Sequence]:
        if self.proposer.unavailable:
            return []
        can_be = [seq for seq in decoding if not seq.sampler.has_processors and self._room(seq) > 0]
        return can_be[: max_guesses // self.max_tokens]

    def _room(self, seq: Sequence) -> int:
        """Guesses that are not beyond the sequence's end."""
        return seq.max_length - seq.length - 1
