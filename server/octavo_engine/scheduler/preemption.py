"""Who is set aside when memory runs out, and how: computed again later, or kept in host memory meanwhile."""

from __future__ import annotations

from collections.abc import Collection

from octavo_engine.kv.block_manager import BlockManager, PrefixMatch
from octavo_engine.scheduler.limits import PreemptionMode
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepTimeModel

_FIRST_BYTES_PER_S = 8e9
_WEIGHT = 0.1


class CopyTime:
    """Seconds that one block takes between device and host memory: a running mean of what copies took."""

    def __init__(self, bytes_per_block: int) -> None:
        self.seconds_per_block = bytes_per_block / _FIRST_BYTES_PER_S

    def observe(self, num_blocks: int, seconds: float) -> None:
        self.seconds_per_block += _WEIGHT * (seconds / num_blocks - self.seconds_per_block)


class Preemption:
    """Compares what it costs to compute positions again with what it costs to copy them.

    Nothing is known before the step-time model is: then prefixes are fetched, and the newest sequence is preempted by
    recompute.
    """

    def __init__(self, blocks: BlockManager, step_time: StepTimeModel, mode: PreemptionMode, copy: CopyTime) -> None:
        self.num_swapped = 0
        self._blocks = blocks
        self._step_time = step_time
        self._mode = mode
        self.copy = copy

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """The sequence to preempt, among those of the worst priority: the one that costs least for each block it
        frees, dearer each time it was chosen before. The oldest one is spared, so that somebody always gets ahead."""
        worst = max(seq.priority for seq in running)
        band = sorted((seq for seq in running if seq.priority == worst), key=lambda seq: seq.rank)
        if len(band) == 1 or not self._step_time.is_ready:
            return band[-1]
        return min(reversed(band[1:]), key=self._cost_per_block)

    def set_aside(self, seq: Sequence) -> bool:
        """Keep what a sequence has computed in host memory, where that is the cheaper way and there is room; its
        blocks are free then."""
        if self._mode is PreemptionMode.RECOMPUTE or seq.wants_prompt_logprobs:
            return False  # log-probabilities of a prompt are reported from its start, in one go
        if self._mode is PreemptionMode.AUTO and self._swap_s(seq) >= self._recompute_s(seq.num_computed):
            return False
        swapped = self._blocks.set_aside(seq.table, seq.tokens, seq.num_computed)
        self.num_swapped += swapped
        return swapped

    def worth_fetching(self, match: PrefixMatch) -> PrefixMatch:
        """The match with its part in host memory, or without where computing that again is quicker."""
        on_device = self._blocks.on_device(match)
        again_s = self._recompute_s(match.num_tokens, on_device.num_tokens)
        if self._mode is PreemptionMode.AUTO and 0.0 < again_s <= len(match.slots) * self.copy.seconds_per_block:
            return on_device
        return match

    def weigh_demotions(self) -> None:
        """Evicted blocks are worth a copy while so many come back that fetching them saves more than copying costs."""
        host, block_s = self._blocks.host, self.copy.seconds_per_block
        if host is None:
            return
        again_s = self._recompute_s(self._blocks.pool.block_size)
        if again_s > 0.0:
            host.least_rate = block_s / (again_s - block_s) if again_s > block_s else float("inf")

    def _cost_per_block(self, seq: Sequence) -> float:
        freed = self._blocks.num_unshared(seq.table)
        if not freed:
            return float("inf")
        cost = self._recompute_s(seq.num_computed)
        if self._blocks.host is not None and self._mode is not PreemptionMode.RECOMPUTE:
            cost = min(cost, self._swap_s(seq))
        return (1 + seq.num_preemptions) * cost / freed

    def _swap_s(self, seq: Sequence) -> float:
        """Out and back again."""
        return 2 * self._blocks.blocks_for(seq.num_computed) * self.copy.seconds_per_block

    def _recompute_s(self, end: int, start: int = 0) -> float:
        return self._step_time.prefill_seconds(start, end)
