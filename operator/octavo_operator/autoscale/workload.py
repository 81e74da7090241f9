"""Arrival traces to judge scaling on: constant, Poisson, bursty, diurnal, or recorded. Deterministic for a seed."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds after the start, tokens in and out."""

    time: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths of prompts and answers, in tokens."""

    input_median: float = 600.0
    input_sigma: float = 0.9
    output_median: float = 220.0
    output_sigma: float = 0.7
    longest: int = 8_000

    def draw(self, dice: random.Random) -> tuple[int, int]:
        def length(middle: float, sigma: float) -> int:
            return max(1, min(self.longest, round(math.exp(dice.gauss(math.log(middle), sigma)))))

        return length(self.input_median, self.input_sigma), length(self.output_median, self.output_sigma)


Rate = Callable[[float], float]
"""Requests per second at a time."""


def constant(rate: float, duration_s: float) -> list[Arrival]:
    """Equal requests at equal distances."""
    lengths = Lengths()
    size = (round(lengths.input_median), round(lengths.output_median))
    return [Arrival(i / rate, *size) for i in range(int(rate * duration_s))]


def poisson(rate: Rate, peak: float, duration_s: float, seed: int, lengths: Lengths | None = None) -> list[Arrival]:
    """A Poisson process of varying rate, by thinning one of rate `peak`."""
    dice, lengths = random.Random(seed), lengths or Lengths()  # noqa: S311 - a simulation
    time = 0.0
    arrivals: list[Arrival] = []
    while True:
        time += dice.expovariate(peak)
        if time >= duration_s:
            return arrivals
        if dice.random() * peak < rate(time):
            arrivals.append(Arrival(time, *lengths.draw(dice)))


def steady(rate: float, duration_s: float, seed: int) -> list[Arrival]:
    """A Poisson process of one rate."""
    return poisson(lambda _: rate, rate, duration_s, seed)


def step(low: float, high: float, duration_s: float, seed: int) -> list[Arrival]:
    """A sudden rise in the middle third."""
    third = duration_s / 3
    return poisson(lambda t: high if third <= t < 2 * third else low, high, duration_s, seed)


def bursty(base: float, burst: float, duration_s: float, seed: int) -> list[Arrival]:
    """Bursts of two minutes at random times over a base rate."""
    dice = random.Random(seed * 7919 + 1)  # noqa: S311
    starts = [dice.uniform(0, duration_s) for _ in range(int(duration_s / 600))]
    return poisson(lambda t: burst if any(s <= t < s + 120 for s in starts) else base, burst, duration_s, seed)


def diurnal(low: float, high: float, duration_s: float, seed: int, period_s: float = 3_600.0) -> list[Arrival]:
    """A day squeezed into a period, with noise."""
    middle, swing = (low + high) / 2, (high - low) / 2
    return poisson(lambda t: middle - swing * math.cos(2 * math.pi * t / period_s), high, duration_s, seed)


def recorded(lines: Iterable[str]) -> Iterator[Arrival]:
    """Arrivals of a CSV with the columns time, input_tokens, output_tokens. Raises ValueError naming the line."""
    start: float | None = None
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            time = float(row["time"])
            start = time if start is None else start
            yield Arrival(time - start, int(row["input_tokens"]), int(row["output_tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: needs time, input_tokens and output_tokens as numbers: {row}") from error
