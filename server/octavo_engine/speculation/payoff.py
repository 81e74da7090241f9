"""How far ahead it pays to guess, by what rounds with and without guesses have taken."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from octavo_engine.scheduler.step_time import StepTimeModel, size_band
from octavo_engine.speculation.curve import MeasuredCurve

TRIAL_SHARE = 0.02
_MIN_ROUNDS_BETWEEN_TRIALS = 16
_MAX_DEBT_ROUNDS = 100
_COVERAGE_WEIGHT = 0.05
_MIN_COVERAGE = 0.01
_FIRST_PLAIN = 4  # rounds without guesses come first: what others cost is relative to them
_UNKNOWN_PRICE = 0.3  # of a guess in tokens, before any step was timed


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoding sequence: the probability that its next guess is accepted, what that might be with luck, and for how
    many tokens it has room."""

    acceptance: float
    upper: float
    room: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Guesses for each candidate, at most `depth`, and the tokens and seconds that a round with them should bring.

    A round that is not the best known is a trial.
    """

    depth: int
    counts: Sequence[int]
    tokens: float
    seconds: float
    is_trial: bool = False

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens


class _Batches:
    """What is known of rounds over about so many sequences."""

    __slots__ = ("last_tried", "num_plain", "num_rounds", "num_trials", "rounds_since_trial", "saved_s", "step_s")

    def __init__(self) -> None:
        self.step_s = MeasuredCurve()  # by guesses
        self.last_tried: dict[int, int] = {}
        self.num_plain = 0
        self.num_rounds = 0
        self.num_trials = 0
        self.rounds_since_trial = 0
        self.saved_s = 0.0  # time that trials may lose


class Payoff:
    """Chooses the depth with the most tokens a second, from 0 to `max_depth`.

    Tokens: the i-th guess in a row is accepted with probability p^i, and a sequence whose guesses bring less than they
    cost on average has none. Seconds: the guesses' own, and those of the last steps over about so many sequences with
    about so many guesses. Verifying is not priced by the token: it is free up to some number of rows and dear behind,
    where that is differs from machine to machine, and a straight line through steps that all have guesses says nothing
    about steps that have none.

    What is not done is not measured. So a depth other than the best is tried now and then, once the time it should lose
    is `TRIAL_SHARE` of all time since the last trial. A choice that is nearly as good is tried often, a bad one seldom.
    Every second trial is of the depth that would bring most if acceptance was as high as it may be by what is known: a
    few trials tell, and they are not spent on depths that cannot pay. The others are of the depth tried longest ago,
    for what has changed.
    """

    def __init__(self, max_depth: int, model: StepTimeModel, guess_seconds: Callable[[int, int], float]) -> None:
        """guess_seconds: what guessing for so many sequences up to such a depth takes."""
        self._max_depth = max_depth
        self._model = model
        self._guess_seconds = guess_seconds
        self._coverage = 1.0  # the part of the guesses asked for that there are
        self._batches: defaultdict[int, _Batches] = defaultdict(_Batches)

    def choose(self, candidates: Sequence[Candidate], num_sequences: int) -> Choice:
        """For a round over `num_sequences`, of which `candidates` can be guessed for.

        Without side effects: it is asked again whether there is something to guess.
        """
        known = self._batches[size_band(max(1, num_sequences))]
        if known.num_plain < _FIRST_PLAIN:
            return Choice(0, [0] * len(candidates), float(num_sequences), 0.0)
        acceptances = [candidate.acceptance for candidate in candidates]
        without = self._weigh(known, [0] * len(candidates), acceptances, num_sequences)
        if without.seconds <= 0.0:
            longest = [_length(acceptance, _UNKNOWN_PRICE) for acceptance in acceptances]
            counts = [min(c.room, self._max_depth, length) for c, length in zip(candidates, longest, strict=True)]
            return Choice(self._max_depth, counts, float(num_sequences), 0.0)
        depths = range(1, self._max_depth + 1)
        choices = [without, *(self._deep(depth, known, candidates, num_sequences, without) for depth in depths)]
        best = min(choices, key=lambda choice: choice.seconds_per_token)
        return self._trial(known, best, candidates, num_sequences) or best

    def covered(self, num_wanted: int, num_guessed: int) -> None:
        """So many of the guesses asked for exist."""
        if num_wanted:
            found = max(_MIN_COVERAGE, num_guessed / num_wanted)
            self._coverage += _COVERAGE_WEIGHT * (found - self._coverage)

    def observe(self, choice: Choice, num_sequences: int, num_guesses: int, step_s: float, guess_s: float) -> None:
        """A round was over: its step took `step_s`, guessing before it `guess_s`."""
        known = self._batches[size_band(max(1, num_sequences))]
        known.step_s.observe(num_guesses, step_s)
        known.num_rounds += 1
        known.num_plain += not num_guesses
        known.rounds_since_trial += 1
        known.last_tried[choice.depth if num_guesses else 0] = known.num_rounds
        if num_guesses < sum(choice.counts):
            known.last_tried[choice.depth] = known.num_rounds  # there was nothing to guess, and that cost nothing
        if choice.is_trial:
            unforeseen_s = max(0.0, step_s + guess_s - choice.seconds)
            known.saved_s = -min(unforeseen_s, _MAX_DEBT_ROUNDS * choice.seconds)
            known.rounds_since_trial = 0
            known.num_trials += 1
        else:
            known.saved_s += TRIAL_SHARE * (step_s + guess_s)

    def _deep(
        self, depth: int, known: _Batches, candidates: Sequence[Candidate], num_sequences: int, without: Choice
    ) -> Choice:
        """`depth` guesses for all, or fewer for those whose guesses are worth less than they cost on average."""
        counts = [min(candidate.room, depth) for candidate in candidates]
        acceptances = [candidate.acceptance for candidate in candidates]
        choice = self._weigh(known, counts, acceptances, num_sequences)
        if not any(counts) or len(candidates) == 1:
            return choice
        price = (choice.seconds - without.seconds) / (self._coverage * sum(counts)) / without.seconds_per_token
        paying = [min(count, _length(p, price)) for p, count in zip(acceptances, counts, strict=True)]
        if paying == counts or not any(paying):
            return choice
        fewer = self._weigh(known, paying, acceptances, num_sequences)
        return fewer if fewer.seconds_per_token < choice.seconds_per_token else choice

    def _weigh(
        self, known: _Batches, counts: Sequence[int], acceptances: Sequence[float], num_sequences: int
    ) -> Choice:
        num_guesses = self._coverage * sum(counts)
        accepted = sum(map(_num_accepted, acceptances, counts))
        step_s = known.step_s.at(num_guesses, self._model.seconds_per_guess or self._model.seconds_per_token) or 0.0
        depth = max(counts, default=0)
        guess_s = self._guess_seconds(sum(1 for count in counts if count), depth) if depth else 0.0
        return Choice(depth, counts, num_sequences + self._coverage * accepted, step_s + guess_s)

    def _trial(
        self, known: _Batches, best: Choice, candidates: Sequence[Candidate], num_sequences: int
    ) -> Choice | None:
        """What to try instead of the best choice, if it is time to. All are guessed for, so that of all is learned."""
        if known.rounds_since_trial < _MIN_ROUNDS_BETWEEN_TRIALS:
            return None
        options: dict[int, list[int]] = {}
        for depth in range(self._max_depth + 1):
            counts = [min(candidate.room, depth) for candidate in candidates]
            if counts != best.counts and max(counts, default=0) == depth:
                options[depth] = counts
        if not options:
            return None
        depth = min(options, key=lambda depth: known.last_tried.get(depth, 0))
        if known.num_trials % 2 == 0:
            at_best = [candidate.upper for candidate in candidates]
            hopes = {d: self._weigh(known, options[d], at_best, num_sequences).seconds_per_token for d in options}
            hope = min(hopes, key=hopes.__getitem__)
            depth = hope if hopes[hope] < best.seconds_per_token else depth
        other = self._weigh(known, options[depth], [c.acceptance for c in candidates], num_sequences)
        loss_s = max(0.0, other.seconds - other.tokens * best.seconds_per_token)
        return replace(other, is_trial=True) if known.saved_s >= loss_s else None


def _num_accepted(acceptance: float, count: int) -> float:
    """Of so many guesses in a row, how many are accepted on average."""
    if acceptance >= 1.0:
        return count
    return acceptance * (1.0 - acceptance**count) / (1.0 - acceptance)


def _length(acceptance: float, price: float) -> int:
    """The longest guess whose last token is accepted with at least probability `price`."""
    if price >= 1.0 or acceptance <= 0.0:
        return 0
    if price <= 0.0 or acceptance >= 1.0:
        return 1 << 30
    return int(math.log(price) / math.log(acceptance))
