"""How much of which prompts a step computes, beside the decodes that must not wait."""

from __future__ import annotations

import statistics
from collections import deque

from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.limits import SchedulerLimits
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel, size_band

# Where decodes alone take longer than the target, prefills may still stretch a step by half: they must not crawl.
MIN_PREFILL_STRETCH = 1.5
SMOOTH_STEP_S = 0.005  # a relative target need not be shorter: nobody sees 200 tokens a second stutter
MARGIN = 1.02  # what decodes alone take is an estimate too
STEPS_BETWEEN_PAUSES = 64
_ALONE_SAMPLES = 9


class PrefillPlanner:
    """Cuts prefills into chunks so that the step keeps its latency target, by the step-time model.

    Prefills start small and at most double what was tried before, so that the model is not asked far beyond what it
    has seen; and no step is planned to be longer than `max_step_s`: a model that is slow on this machine must not look
    hung.

    What decodes alone take is measured: steps that all have prefills do not tell which part of their time is whose, and
    a fit to them alone drifts, until chunks are far too long. So a long prompt pauses for one step in 64.
    """

    def __init__(self, limits: SchedulerLimits, step_time: StepTimeModel) -> None:
        self._limits = limits
        self._step_time = step_time
        self._known_tokens = limits.first_prefill_tokens
        self._alone_s: dict[int, deque[float]] = {}  # by size of the step, half an octave each
        self._steps_since_alone = 0

    def observe(self, batch: Batch, seconds: float) -> None:
        """A step of this size was tried."""
        self._steps_since_alone += 1
        if not batch.prefill_pairs and batch.num_tokens:
            self._steps_since_alone = 0
            self._alone_s.setdefault(size_band(batch.num_tokens), deque(maxlen=_ALONE_SAMPLES)).append(seconds)
        if 2 * seconds <= self._limits.max_step_s:
            self._known_tokens = max(self._known_tokens, 2 * batch.num_tokens)

    def budget(self, batch: Batch) -> int:
        """The most tokens that prefills could have beside the decodes in `batch`: what they can if all are at their
        start, where attention costs least."""
        limits = self._limits
        budget = limits.max_num_batched_tokens - batch.num_tokens
        if not limits.itl_target_s:
            return budget
        if limits.itl_stretch and batch.slices and self._steps_since_alone >= STEPS_BETWEEN_PAUSES:
            return 0
        budget = min(budget, self._known_tokens)
        fitting = self._step_time.prefill_tokens_within(self._target_s(batch), batch.load, 0)
        return budget if fitting is None else min(budget, max(limits.min_prefill_tokens, fitting))

    def chunks(self, batch: Batch, prefills: list[Sequence], budget: int) -> list[int]:
        """Tokens of each prefill, in the given order: all of `budget` if the step then keeps its target, else as many
        as it can, with attention over what each has computed taken into account."""
        wanted = self._wanted_tokens(prefills)
        chunks = self._share(prefills, wanted, budget)
        if not self._limits.itl_target_s or not self._step_time.is_ready:
            return chunks
        target_s = self._target_s(batch)
        low, high = min(budget, self._limits.min_prefill_tokens), budget
        if self._seconds(batch, prefills, chunks) <= target_s:
            return chunks
        while high - low > max(1, low // 64):
            middle = (low + high) // 2
            if self._seconds(batch, prefills, self._share(prefills, wanted, middle)) <= target_s:
                low = middle
            else:
                high = middle
        return self._share(prefills, wanted, low)

    def _target_s(self, batch: Batch) -> float:
        """How long the step may take."""
        limits = self._limits
        if not batch.slices:
            return limits.max_step_s
        alone_s = self._seconds_alone(batch)
        target_s = limits.itl_target_s
        if limits.itl_stretch:
            stretch = limits.itl_stretch / (MARGIN * self._step_time.prefill_overrun)
            target_s = min(target_s, max(SMOOTH_STEP_S, stretch * alone_s))
        return max(target_s, MIN_PREFILL_STRETCH * alone_s)

    def _seconds_alone(self, batch: Batch) -> float:
        """What the decodes in `batch` take without prefills: as measured last, or by the model for another batch."""
        measured = self._alone_s.get(size_band(batch.num_tokens))
        return statistics.median(measured) if measured else self._step_time.predict(batch.load)

    def _seconds(self, batch: Batch, prefills: list[Sequence], chunks: list[int]) -> float:
        pairs = sum(map(pairs_of, prefills, chunks))
        num_tokens = batch.num_tokens + sum(chunks)
        return self._step_time.predict(StepLoad(num_tokens, batch.decode_context, pairs, batch.num_guesses))

    def _share(self, prefills: list[Sequence], wanted: list[int], budget: int) -> list[int]:
        """A quarter of a fair part for each of the first few, so that all advance; the rest by priority to those that
        end soonest: a short prompt is not spread over several steps by a long one beside it."""
        least = max(1, budget // (4 * min(len(wanted), self._limits.max_num_partial_prefills)))
        left = budget
        chunks = []
        for want in wanted:
            chunks.append(min(want, least, left))
            left -= chunks[-1]
        for index in sorted(range(len(wanted)), key=lambda index: (prefills[index].priority, wanted[index])):
            extra = min(wanted[index] - chunks[index], left)
            left -= extra
            chunks[index] += extra
        return chunks

    def _wanted_tokens(self, prefills: list[Sequence]) -> list[int]:
        """Tokens each prefill could use; those that report prompt log-probabilities share a bound of their own."""
        wanted = []
        rows_left = self._limits.max_logits_rows
        for seq in prefills:
            want = seq.num_uncomputed
            if seq.wants_prompt_logprobs:
                want = min(want, rows_left)
                rows_left -= want
            wanted.append(want)
        return wanted


def pairs_of(seq: Sequence, num_tokens: int) -> int:
    """Pairs of a new token and a position it attends to, for the next chunk of a sequence."""
    return num_tokens * (seq.num_launched + num_tokens // 2)
