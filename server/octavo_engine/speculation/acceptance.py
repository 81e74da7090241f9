"""How often guesses come true."""

from __future__ import annotations

import math

_MEMORY = 200.0  # guesses: older ones count less
_RECENT = 24.0
_SURPRISE = 3.0  # nats: chance alone does that about once in 100,000 guesses (a running mean of 24 varies as of 47)
_AFRESH = 8.0  # guesses that those last ones then count as: some of them are from before the change
_SMALLEST = 0.01  # of a probability, in what is compared
_SIGMAS = 1.5


class Acceptance:
    """The part of the last two hundred guesses that was accepted, and how sure that is.

    Guesses are forgotten as others are made, never by time: what is seldom tried is not forgotten before it is tried
    again. When the last few contradict all of them (a relative entropy that chance does not explain), learning begins
    anew with what those few say: what has changed is learned soon, and what has not is known precisely.
    """

    __slots__ = ("_accepted", "_num", "_recent_accepted", "_recent_num")

    def __init__(self, first: float, weight: float) -> None:
        """Begin as if a part `first` of `weight` guesses had been accepted."""
        self._num, self._accepted = weight, first * weight
        self._recent_num = self._recent_accepted = 0.0

    @property
    def mean(self) -> float:
        return self._accepted / self._num

    @property
    def upper(self) -> float:
        """What it might be with luck: the upper end of Wilson's interval of 1.5 standard deviations."""
        square = _SIGMAS**2 / self._num
        spread = _SIGMAS * math.sqrt(self.mean * (1.0 - self.mean) / self._num + square / (4.0 * self._num))
        return min(1.0, (self.mean + square / 2.0 + spread) / (1.0 + square))

    def observe(self, accepted: bool) -> None:
        """Learn from one guess that was verified."""
        self._recent_num += 1.0 - self._recent_num / _RECENT
        self._recent_accepted += accepted - self._recent_accepted / _RECENT
        self._num += 1.0 - self._num / _MEMORY
        self._accepted += accepted - self._accepted / _MEMORY
        recent = self._recent_accepted / self._recent_num
        if self._recent_num * _divergence(recent, self.mean) > _SURPRISE:
            self._num = self._recent_num = _AFRESH
            self._accepted = self._recent_accepted = recent * _AFRESH


def _divergence(found: float, expected: float) -> float:
    """Relative entropy between two probabilities, in nats."""
    expected = min(1.0 - _SMALLEST, max(_SMALLEST, expected))
    terms = ((found, expected), (1.0 - found, 1.0 - expected))
    return sum(part * math.log(part / of) for part, of in terms if part > 0.0)
