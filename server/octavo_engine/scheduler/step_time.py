"""How long a step takes, learned while the engine runs."""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass

# Units that bring every feature near 1, so that the recursion is well conditioned.
_SCALE = (1.0, 1 / 256, 1 / 8_192, 1 / 65_536, 1 / 64)
_SIZE = len(_SCALE)
_FORGETTING = 0.998
_INITIAL_VARIANCE = 100.0
_CLIP = 4.0
_SMALL_ERROR = 0.02  # of a step's time: below it an error is usual, however quiet the machine was
_READY_AFTER = 4
_OVERRUN_WINDOW = 128
_OVERRUN_RANK = 3  # from the longest: one step nobody could foresee says nothing about the next hundred
_FIRST_OVERRUN = 1.15
_MAX_OVERRUN = 1.4


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes. `decode_context`: KV positions that one-token slices read. `prefill_pairs`: pairs of a new
    token and a position it attends to, over the longer slices. `num_guesses`: those of the tokens that are verified."""

    num_tokens: int
    decode_context: int = 0
    prefill_pairs: int = 0
    num_guesses: int = 0


class StepTimeModel:
    """`seconds = a + b * (num_tokens - num_guesses) + c * decode_context + d * prefill_pairs + e * num_guesses`, fitted
    by recursive least squares. Guesses have a price of their own: each has logits, which prefill tokens have not.

    Old steps are forgotten slowly, so the fit follows a throttled processor or a changed neighbour. A step whose
    residual is beyond four times the usual one gets less weight (Huber's), also in how sure it makes the fit: a page
    fault or a paused container does not spoil it, and a load of a new kind is still learned from its next steps.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * _SIZE
        self._covariance = [[_INITIAL_VARIANCE * (i == j) for j in range(_SIZE)] for i in range(_SIZE)]
        self._usual_error = 0.0
        self._num_observed = 0
        self._overruns: deque[float] = deque()
        self._sorted_overruns: list[float] = []

    @property
    def is_ready(self) -> bool:
        """Enough steps were seen to predict with."""
        return self._num_observed >= _READY_AFTER

    @property
    def seconds_per_token(self) -> float:
        """What one more prefill token adds, attention aside; 0 before it is known."""
        return max(0.0, self._weights[1]) * _SCALE[1]

    @property
    def seconds_per_guess(self) -> float:
        """What one more token to verify adds; 0 before it is known."""
        return max(0.0, self._weights[4]) * _SCALE[4]

    @property
    def seconds(self) -> dict[str, float]:
        """What the model has learned: seconds for a step, and more for each token, position read, pair and guess."""
        names = ("step", "token", "decode_context", "prefill_pair", "guess")
        return {name: max(0.0, w) * s for name, w, s in zip(names, self._weights, _SCALE, strict=True)}

    @property
    def prefill_overrun(self) -> float:
        """By what factor the longest steps with prefills outlast their prediction: the third longest of the last ones,
        within [1, 1.4], 1.15 until there are enough of them. Beyond that it is the machine that wavers, whatever the
        chunks are."""
        ratios = self._sorted_overruns
        if len(ratios) < _OVERRUN_WINDOW // 4:
            return _FIRST_OVERRUN
        return min(_MAX_OVERRUN, max(1.0, ratios[-_OVERRUN_RANK]))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if load.prefill_pairs and self.is_ready:
            self._note_overrun(load, seconds)
        features = _features(load)
        error = seconds - sum(w * x for w, x in zip(self._weights, features, strict=True))
        self._num_observed += 1
        weight = 1.0
        if self._num_observed > _READY_AFTER:
            bound = _CLIP * max(self._usual_error, _SMALL_ERROR * seconds, 1e-6)
            # The bound widens while errors stay large: a lasting change is learned within some tens of steps.
            self._usual_error += 0.05 * (min(abs(error), 2 * bound) - self._usual_error)
            weight = min(1.0, bound / max(abs(error), 1e-12))
        else:
            self._usual_error += (abs(error) - self._usual_error) / self._num_observed
        self._update(features, error, weight)

    def predict(self, load: StepLoad) -> float:
        """Seconds the step should take; 0 before anything is known."""
        return sum(max(0.0, w) * x for w, x in zip(self._weights, _features(load), strict=True))

    def prefill_seconds(self, start: int, end: int) -> float:
        """What the tokens at positions `start .. end - 1` add to the steps that compute them; 0 before it is known."""
        if not self.is_ready:
            return 0.0
        quadratic = max(0.0, self._weights[3]) * _SCALE[3]
        return (end - start) * self.seconds_per_token + quadratic * (end * end - start * start) / 2

    def prefill_tokens_within(self, seconds: float, decode: StepLoad, start: int) -> int | None:
        """Prefill tokens, at positions from `start` on, that fit a step of `seconds` beside `decode`.

        None when the model does not know yet or sees no cost. Solves `a' + b' n + d n^2 / 2 = seconds` for n.
        """
        if not self.is_ready:
            return None
        spare = seconds - self.predict(decode)
        quadratic = max(0.0, self._weights[3]) * _SCALE[3]
        linear = self.seconds_per_token + quadratic * start
        if spare <= 0:
            return 0
        if quadratic > 1e-15:
            root = math.sqrt(linear * linear + 2 * quadratic * spare)
            return int((root - linear) / quadratic)
        return int(spare / linear) if linear > 1e-12 else None

    def _note_overrun(self, load: StepLoad, seconds: float) -> None:
        predicted = self.predict(load)
        if predicted <= 0.0:
            return
        self._overruns.append(seconds / predicted)
        bisect.insort(self._sorted_overruns, seconds / predicted)
        if len(self._overruns) > _OVERRUN_WINDOW:
            oldest = self._overruns.popleft()
            del self._sorted_overruns[bisect.bisect_left(self._sorted_overruns, oldest)]

    def _update(self, features: tuple[float, ...], error: float, weight: float) -> None:
        covariance = self._covariance
        projected = [sum(p * x for p, x in zip(row, features, strict=True)) for row in covariance]
        norm = _FORGETTING / weight + sum(x * p for x, p in zip(features, projected, strict=True))
        gain = [p / norm for p in projected]
        self._weights = [w + g * error for w, g in zip(self._weights, gain, strict=True)]
        trace = 0.0
        for i in range(_SIZE):
            row = covariance[i]
            for j in range(_SIZE):
                row[j] = (row[j] - gain[i] * projected[j]) / _FORGETTING
            trace += row[i]
        if trace > _SIZE * _INITIAL_VARIANCE:  # what the load does not show must not grow without bound
            shrink = _SIZE * _INITIAL_VARIANCE / trace
            self._covariance = [[value * shrink for value in row] for row in covariance]


def size_band(size: float) -> int:
    """Which band of sizes, half an octave wide, one of at least 1 falls into."""
    return int(2 * math.log2(size))


def _features(load: StepLoad) -> tuple[float, float, float, float, float]:
    return (
        1.0,
        (load.num_tokens - load.num_guesses) * _SCALE[1],
        load.decode_context * _SCALE[2],
        load.prefill_pairs * _SCALE[3],
        load.num_guesses * _SCALE[4],
    )
