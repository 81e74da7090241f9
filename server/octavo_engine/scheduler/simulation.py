"""A simulated engine around the real scheduler: judges policies on a trace, on a clock of its own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise

from octavo_engine.errors import QueueFullError
from octavo_engine.kv.block_manager import BlockManager
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.host_tier import HostTier
from octavo_engine.messages import AddRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.limits import SchedulerLimits
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad
from octavo_engine.speculation.speculator import Speculator

GENERATED_TOKEN = 1


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """An arrival of a trace; it generates exactly `num_output_tokens` unless its deadline ends it."""

    name: str
    arrival_s: float
    prompt: tuple[int, ...]
    num_output_tokens: int
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None


@dataclass(slots=True)
class Timeline:
    """When the tokens of one request came."""

    request: SimulatedRequest
    token_times_s: list[float] = field(default_factory=list)
    finished_s: float | None = None
    rejected: bool = False
    expired: bool = False

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.request.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


@dataclass(slots=True)
class SimulationResult:
    timelines: dict[str, Timeline]
    num_steps: int
    seconds: float
    num_preemptions: int
    num_swapped: int

    def ttft_s(self, of: Callable[[SimulatedRequest], bool], quantile: float) -> float:
        """A quantile of the time to the first token over some requests."""
        times = [t.ttft_s for t in self.timelines.values() if t.token_times_s and of(t.request)]
        return _quantile(times, quantile)

    def gap_s(self, of: Callable[[SimulatedRequest], bool], quantile: float) -> float:
        """A quantile of the inter-token latency over some requests."""
        return _quantile([gap for t in self.timelines.values() if of(t.request) for gap in t.gaps_s], quantile)


class SimulatedGuesses:
    """A proposer whose guesses hold with probability `acceptance(request_id, now)`, and take
    `seconds_of(num_sequences, depth)` of the simulated clock.

    Luck belongs to a position of a request, by `seed`: however far is guessed, the same tokens are hard to guess, so
    that ways of guessing can be compared without a difference by chance.
    """

    unavailable = ""

    def __init__(
        self,
        max_tokens: int,
        acceptance: Callable[[str, float], float],
        seconds_of: Callable[[int, int], float],
        seed: int = 0,
    ) -> None:
        self.max_tokens = max_tokens
        self.clock_s = 0.0
        self._acceptance = acceptance
        self._seconds_of = seconds_of
        self._seed = seed
        self._luck: dict[str, tuple[random.Random, list[float]]] = {}

    def seconds(self, num_sequences: int, depth: int) -> float:
        return self._seconds_of(num_sequences, depth)

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[list[int]]:
        self.clock_s += self._seconds_of(len(wanted), max(count for _, count in wanted))
        return [[GENERATED_TOKEN] * count for _, count in wanted]

    def num_accepted(self, seq: Sequence) -> int:
        """By chance, how many of the guesses are what the model chooses."""
        name = seq.request_id
        acceptance = self._acceptance(name, self.clock_s)
        if name not in self._luck:
            self._luck[name] = random.Random(f"{self._seed} {name}"), []  # noqa: S311 - chance, not a secret
        rng, luck = self._luck[name]
        start, count = seq.num_output_tokens, len(seq.drafted)
        luck.extend(rng.random() for _ in range(start + count - len(luck)))
        return next((i for i in range(count) if luck[start + i] >= acceptance), count)

    def forget(self, seq: Sequence) -> None:
        """Nothing is kept."""


class Simulation:
    """Runs a trace to its end; `step_seconds` is the true cost of a step, which the scheduler has to learn."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        num_blocks: int,
        block_size: int = 16,
        step_seconds: Callable[[StepLoad], float],
        enable_caching: bool = True,
        on_step: Callable[[Scheduler, Batch], None] | None = None,
        num_host_blocks: int = 0,
        copy_seconds: float = 0.0,
        guesses: SimulatedGuesses | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, enable_caching=enable_caching)
        self.host = HostTier(BlockPool(num_host_blocks, block_size, enable_caching=enable_caching))
        manager = BlockManager(self.pool, self.host if num_host_blocks else None)
        self.scheduler = Scheduler(limits, manager)
        self._copy_seconds = copy_seconds
        self._step_seconds = step_seconds
        self._on_step = on_step
        self._guesses = guesses
        if guesses is not None:
            self.scheduler.speculator = Speculator(
                guesses.max_tokens, self.scheduler.step_time, guesses, lambda: guesses.clock_s
            )
        self._now = 0.0
        self._timelines: dict[str, Timeline] = {}

    def run(self, requests: Iterable[SimulatedRequest], max_steps: int = 1_000_000) -> SimulationResult:
        """Feed every request at its time and step until all have ended; raises `RuntimeError` if they never do."""
        arrivals = [(request.arrival_s, index, request) for index, request in enumerate(requests)]
        heapq.heapify(arrivals)
        num_steps = 0
        while arrivals or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self._now = max(self._now, arrivals[0][0])
            while arrivals and arrivals[0][0] <= self._now:
                self._add(heapq.heappop(arrivals)[2])
            self._step()
            num_steps += 1
            if num_steps > max_steps:
                raise RuntimeError(f"not done after {max_steps} steps: {self.scheduler.sequences()[:5]}")
        return SimulationResult(
            self._timelines, num_steps, self._now, self.scheduler.num_preemptions, self.scheduler.preemption.num_swapped
        )

    def _add(self, request: SimulatedRequest) -> None:
        timeline = self._timelines[request.name] = Timeline(request)
        sampling = SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0)
        message = AddRequest(
            request_id=request.name,
            prompt_token_ids=list(request.prompt),
            sampling=sampling,
            tenant=request.tenant,
            priority=request.priority,
            deadline_s=request.deadline_s,
        )
        try:
            self.scheduler.add(Sequence(message, request.arrival_s))
        except QueueFullError:
            timeline.rejected = True

    def _step(self) -> None:
        for seq in self.scheduler.pop_expired(self._now):
            self._timelines[seq.request_id].expired = True
            self.scheduler.finish(seq)
        if self._guesses is not None:
            self._guesses.clock_s = self._now
        batch = self.scheduler.schedule(self._now)
        if self._guesses is not None:
            self._now = self._guesses.clock_s
        if self._on_step is not None:
            self._on_step(self.scheduler, batch)
        if not batch.slices:
            return
        self._copy()
        self.scheduler.launched(batch)
        seconds = self._step_seconds(batch.load)
        self._now += seconds
        self.scheduler.observe(batch, seconds)
        self.scheduler.landed(batch)
        for seq, piece in zip(batch.sequences, batch.slices, strict=True):
            if seq.drafted:
                self._verify(seq)
                continue
            self.scheduler.advance(seq, len(piece.token_ids))
            if seq.num_computed == len(seq.tokens):
                self._append(seq)

    def _verify(self, seq: Sequence) -> None:
        guesses, speculator = self._guesses, self.scheduler.speculator
        if guesses is None or speculator is None:
            raise RuntimeError("guesses without a speculator")
        num_accepted = guesses.num_accepted(seq)
        speculator.observe(seq, len(seq.drafted), num_accepted)
        seq.drafted = []
        for _ in range(num_accepted):
            self._append(seq)
        self.scheduler.advance(seq, 1 + num_accepted)
        seq.num_launched = seq.num_computed
        self._append(seq)

    def _copy(self) -> None:
        num_blocks = sum(map(len, self.host.take_transfers()))
        if num_blocks:
            self.scheduler.preemption.copy.observe(num_blocks, num_blocks * self._copy_seconds)
            self._now += num_blocks * self._copy_seconds

    def _append(self, seq: Sequence) -> None:
        timeline = self._timelines[seq.request_id]
        seq.tokens.append(GENERATED_TOKEN)
        timeline.token_times_s.append(self._now)
        self.scheduler.fairness.charge_output(seq.tenant)
        if seq.num_output_tokens >= timeline.request.num_output_tokens:
            timeline.finished_s = self._now
            self.scheduler.finish(seq)


def _quantile(values: list[float], quantile: float) -> float:
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(quantile * len(values)))]
