"""The scheduler: one token budget for prefill, decode and resume."""

from __future__ import annotations

import enum
import heapq
from dataclasses import replace

from octavo_engine.errors import QueueFullError
from octavo_engine.kv.block_manager import BlockManager, PrefixMatch
from octavo_engine.lora.slots import AdapterSlots
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.fairness import VirtualTokens
from octavo_engine.scheduler.forecast import Forecast, OutputLengths
from octavo_engine.scheduler.limits import SchedulerLimits
from octavo_engine.scheduler.preemption import CopyTime, Preemption
from octavo_engine.scheduler.prefill import PrefillPlanner, pairs_of
from octavo_engine.scheduler.sequence import Sequence, SequenceState
from octavo_engine.scheduler.slices import decode_slice, prefill_slice, verifying_slice
from octavo_engine.scheduler.step_time import StepTimeModel
from octavo_engine.scheduler.waiting_queue import WaitingQueue
from octavo_engine.speculation.speculator import Speculator


class Admission(enum.Enum):
    """What became of a waiting sequence; a deferred one waits for a prefix that is being computed."""

    STARTED = enum.auto()
    BLOCKED = enum.auto()
    DEFERRED = enum.auto()


class WaitReason(enum.StrEnum):
    """Why a step could not be launched before the one in flight was over."""

    SPECULATION = "speculation"  # what to guess depends on the tokens in flight
    PREEMPTION = "preemption"  # memory is short, and who gives some back cannot be in flight
    HOST_MEMORY = "host_memory"  # blocks are copied to or from host memory first
    ADAPTERS = "adapters"  # an adapter's slot is overwritten first
    EMBEDDINGS = "embeddings"  # texts are pooled first
    INTERRUPTION = "interruption"  # an exception, such as Ctrl-C, left the round before unfinished
    FAILURE = "failure"  # the step in flight failed, and is computed again without what failed


class Scheduler:
    """Decides step by step which tokens are computed, and owns every sequence until it ends.

    Every running sequence that decodes gets its token in every step, or in every round of steps where `num_stages` of
    them are computed at a time, each with its share of the sequences; what is left of the token budget goes to
    prefills in chunks, of which a long one never takes all while others wait. A sequence gets the blocks of its whole
    prompt when it is admitted; when a decode finds no free block, a sequence of the worst priority is preempted: its
    blocks are freed, and its tokens wait in host memory or are computed again later (see `Preemption`).
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        adapters: AdapterSlots | None = None,
        copy: CopyTime | None = None,
    ) -> None:
        if limits.max_num_batched_tokens <= limits.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({limits.max_num_batched_tokens}) must be above max_num_seqs "
                f"({limits.max_num_seqs}), or prefills could starve"
            )
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.speculator: Speculator | None = None
        self.num_stages = 1
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.host_hits = 0
        self._sequences: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self.fairness = VirtualTokens(limits.tenant_weights)
        self.step_time = StepTimeModel()
        self._planner = PrefillPlanner(limits, self.step_time)
        self.preemption = Preemption(blocks, self.step_time, limits.preemption_mode, copy or CopyTime(0))
        self.lengths = OutputLengths()
        self._forecast = Forecast(self.step_time, self.lengths, limits.max_num_seqs)
        self._waiting = WaitingQueue(self.fairness, ageing_s=limits.ageing_s)
        self._deadlines: list[tuple[float, str]] = []
        self._head_blocked = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def queue_room(self) -> int:
        """How many more sequences may come: up to the queue's bound, and for the free places of the batch."""
        places = 0 if self._head_blocked else self.limits.max_num_seqs - len(self._running)
        return self.limits.max_queued_requests + places - len(self._waiting)

    @property
    def queued_work_s(self) -> float:
        """Seconds of work that wait, by the step-time model."""
        return self._forecast.queued_work_s(len(self._waiting), self._waiting.num_tokens, len(self._running))

    @property
    def retry_after_s(self) -> float:
        """When a client that is refused now should come back."""
        return self._forecast.retry_after_s(len(self._waiting), self._waiting.num_tokens, len(self._running))

    def get(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return list(self._sequences.values())

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; raises `QueueFullError` when a bound is reached and no place in the batch is free."""
        self._check_queue(seq.num_prompt_tokens)
        self._sequences[seq.request_id] = seq
        self.fairness.enter(seq.tenant)
        self._waiting.push(seq)
        if seq.deadline_s is not None:
            heapq.heappush(self._deadlines, (seq.deadline_s, seq.request_id))
            if len(self._deadlines) > 2 * len(self._sequences) + 1_024:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._sequences]
                heapq.heapify(self._deadlines)

    def finish(self, seq: Sequence) -> None:
        """The one place where a sequence ends, whatever the reason: its blocks are free afterwards, or once the steps
        in flight that write them have `landed`."""
        if seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)
            self.blocks.forget_set_aside(seq.table)
        elif seq.state is SequenceState.RUNNING:
            del self._running[seq.request_id]
            if not seq.num_in_flight:
                self._let_go(seq)
        else:
            return
        seq.state = SequenceState.FINISHED
        self.fairness.leave(seq.tenant)
        self.lengths.observe(seq.tenant, seq.num_output_tokens)
        del self._sequences[seq.request_id]

    def pop_expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed; the caller finishes them."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = self._sequences.get(heapq.heappop(self._deadlines)[1])
            if seq is not None and seq.deadline_s is not None and seq.deadline_s <= now:
                expired.append(seq)
        return expired

    def schedule(self, now: float) -> Batch:
        """Choose the next step's tokens; an empty batch means there is nothing to do."""
        self.preemption.weigh_demotions()
        preempted = self._reserve_decode_blocks()
        batch = Batch([], [])
        prefills: list[Sequence] = []
        decoding = batch.sequences
        share = -(-len(self._running) // self.num_stages)
        for seq in self._running.values():
            tokens, start, pending = seq.tokens, seq.num_launched, seq.num_pending
            left = len(tokens) + pending - start
            if pending and len(tokens) + pending >= seq.max_length:
                continue  # its last token is being chosen
            if self.num_stages > 1 and (pending or (left == 1 and len(decoding) == share)):
                continue  # in another stage, or left to another step
            (decoding if left == 1 else prefills).append(seq)
        if decoding and self.speculator is not None:
            self._guess(batch, self.speculator)
        slices = batch.slices = [verifying_slice(seq) if seq.drafted else decode_slice(seq) for seq in decoding]
        batch.decode_context = sum(piece.start for piece in slices)
        batch.num_tokens = sum(len(piece.token_ids) for piece in slices)
        budget = self._planner.budget(batch)
        if preempted:
            self._head_blocked = True
        else:
            self._admit(prefills, budget, now)
        if prefills:
            self._add_prefills(batch, prefills, budget)
        return batch

    def reason_to_wait(self) -> WaitReason | None:
        """Why the steps in flight must land before the next one can be scheduled; None if it need not wait."""
        speculator, running = self.speculator, self._running.values()
        if speculator is not None:
            decoding = [seq for seq in running if seq.num_uncomputed == 1]
            if any(seq.drafted for seq in running) or speculator.wants(decoding, self._max_guesses):
                return WaitReason.SPECULATION
        growing = sum(1 for seq in running if self._grows(seq))
        return WaitReason.PREEMPTION if growing > self.blocks.pool.num_free else None

    def launched(self, batch: Batch) -> None:
        """A step over this batch is on its way; until it has `landed`, nothing it writes is given to others."""
        for seq, piece in zip(batch.sequences, batch.slices, strict=True):
            seq.num_in_flight += 1
            end = seq.num_launched = piece.start + len(piece.token_ids)
            if piece.num_logits and end == len(seq.tokens) + seq.num_pending:
                batch.choosing.append(seq)
                seq.num_pending += 1

    def landed(self, batch: Batch) -> None:
        """The step is over, whatever came of it."""
        for seq in batch.choosing:
            seq.num_pending -= 1
        for seq in batch.sequences:
            seq.num_in_flight -= 1
            if not seq.num_in_flight and seq.state is SequenceState.FINISHED:
                self._let_go(seq)

    def _guess(self, batch: Batch, speculator: Speculator) -> None:
        """Guess the next tokens of decoding sequences, within spare blocks; those without a guess come first."""
        guessing = speculator.guess(batch.sequences, self._max_guesses)
        num_guesses = 0
        for seq in batch.sequences:
            if seq.drafted and not self.blocks.grow(seq.table, len(seq.tokens) + len(seq.drafted)):
                seq.drafted = seq.drafted[: seq.table.capacity - len(seq.tokens)]
            num_guesses += len(seq.drafted)
        batch.guessing = replace(guessing, num_guesses=num_guesses)
        batch.sequences.sort(key=lambda seq: bool(seq.drafted))

    @property
    def _max_guesses(self) -> int:
        """Half of what a step could compute beside one token for each sequence."""
        return (self.limits.max_num_batched_tokens - self.limits.max_num_seqs) // 2

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn how long a step took."""
        self.step_time.observe(batch.load, seconds)
        self._planner.observe(batch, seconds)
        if batch.guessing is not None and self.speculator is not None:
            self.speculator.observe_round(batch.guessing, batch.load, seconds)

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """Record that the next `num_tokens` tokens of `seq` are in the cache now; full blocks become findable."""
        seq.num_computed += num_tokens
        table = seq.table
        if seq.num_computed - table.num_published * self.blocks.pool.block_size >= self.blocks.pool.block_size:
            self.blocks.publish(table, seq.tokens, seq.num_computed)

    def _check_queue(self, num_tokens: int) -> None:
        limits = self.limits
        retry_after_s = self.retry_after_s
        if self.queue_room <= 0:
            raise QueueFullError(
                f"the waiting queue is full ({limits.max_queued_requests} requests); "
                f"try again in {retry_after_s:.0f} s, or raise max_queued_requests",
                retry_after_s,
            )
        if len(self._waiting) and self._waiting.num_tokens + num_tokens > limits.max_queued_tokens:
            raise QueueFullError(
                f"the waiting queue is full ({self._waiting.num_tokens} of {limits.max_queued_tokens} prompt tokens); "
                f"try again in {retry_after_s:.0f} s, or raise max_queued_tokens",
                retry_after_s,
            )

    def _reserve_decode_blocks(self) -> bool:
        """Give each running sequence the block its next token needs; True if that took a preemption."""
        preempted = False
        short = [seq for seq in self._running.values() if seq.table.capacity < len(seq.tokens) + seq.num_pending]
        for seq in short:
            while seq.state is SequenceState.RUNNING and self._grows(seq):
                if self.blocks.grow(seq.table, seq.length):
                    break
                self._preempt(self.preemption.victim(self._running.values()))
                preempted = True
        return preempted

    def _grows(self, seq: Sequence) -> bool:
        """Whether the next token needs one more block."""
        return seq.table.capacity < seq.length < seq.max_length

    def _let_go(self, seq: Sequence) -> None:
        """A sequence that runs no more gives back what it holds."""
        self.blocks.free(seq.table)
        if self.speculator is not None:
            self.speculator.forget(seq)
        if self.adapters is not None and seq.adapter is not None:
            self.adapters.unpin(seq.adapter)
            seq.adapter_slot = None

    def _preempt(self, seq: Sequence) -> None:
        self.preemption.set_aside(seq)
        del self._running[seq.request_id]
        self._let_go(seq)
        seq.num_computed = seq.num_launched = 0
        seq.num_preemptions += 1
        seq.state = SequenceState.WAITING
        self.num_preemptions += 1
        self._waiting.push(seq)

    def _admit(self, prefills: list[Sequence], budget: int, now: float) -> None:
        """Move waiting sequences that fit into `prefills`, in order of rank, a blocked one overtaken within bounds."""
        limits = self.limits
        planned = sum(seq.num_uncomputed for seq in prefills)
        reserve = self._growth_blocks() if self._waiting else 0
        blocked: list[Sequence] = []
        deferred: list[Sequence] = []
        while (
            len(self._running) < limits.max_num_seqs
            and len(blocked) < limits.overtake_window
            and len(deferred) < limits.deferral_window
        ):
            if planned >= budget and len(prefills) >= limits.max_num_partial_prefills:
                break
            if blocked and blocked[0].num_overtaken >= limits.max_overtakes:
                break
            seq = self._waiting.pop(best_band=bool(blocked))
            if seq is None:
                break
            admission = self._try_start(seq, reserve if self._running else 0, now)
            if admission is not Admission.STARTED:
                (blocked if admission is Admission.BLOCKED else deferred).append(seq)
                continue
            for passed in blocked:
                passed.num_overtaken += 1
            self._waiting.admitted(seq, now)
            planned += seq.num_uncomputed
            prefills.append(seq)
        self._head_blocked = bool(blocked)
        for seq in (*blocked, *deferred):
            self._waiting.push(seq)

    def _try_start(self, seq: Sequence, reserve: int, now: float) -> Admission:
        blocks = self.blocks
        match = PrefixMatch([])
        if not seq.wants_prompt_logprobs:
            match = blocks.match_prefix(seq.table, seq.tokens)
        if match.slots:
            match = self.preemption.worth_fetching(match)
        if self._running and blocks.num_coming(seq.table, match) >= self.limits.min_coming_blocks:
            return Admission.DEFERRED
        if blocks.num_free_after(match, len(seq.tokens)) < reserve:
            return Admission.BLOCKED
        if self.adapters is not None and seq.adapter is not None:
            seq.adapter_slot = self.adapters.pin(seq.adapter)
            if seq.adapter_slot is None:
                return Admission.BLOCKED
        blocks.allocate(seq.table, match, seq.tokens)
        seq.num_computed = seq.num_launched = match.num_tokens
        self.prefix_queries += len(seq.tokens)
        self.prefix_hits += seq.num_computed
        self.host_hits += match.num_tokens - blocks.on_device(match).num_tokens
        if seq.first_scheduled_s is None:
            seq.first_scheduled_s = now
            seq.num_cached_tokens = seq.num_computed
            self.fairness.charge_prompt(seq.tenant, seq.num_uncomputed)
        seq.state = SequenceState.RUNNING
        self._running[seq.request_id] = seq
        return Admission.STARTED

    def _growth_blocks(self) -> int:
        """Blocks that admission leaves free for what runs: a share of the growth its tenants' past outputs promise."""
        growth = 0.0
        for seq in self._running.values():
            growth += max(0.0, self.lengths.expected(seq.tenant, seq.sampling.max_tokens) - seq.num_output_tokens)
        expected = int(self.limits.growth_reserve * growth) // self.blocks.pool.block_size
        return max(1, int(self.limits.watermark * self.blocks.pool.num_blocks), expected)

    def _add_prefills(self, batch: Batch, prefills: list[Sequence], budget: int) -> None:
        """Put a chunk of each prefill into the batch, chunks of one token first."""
        prefills.sort(key=lambda seq: seq.rank)
        chunks = self._planner.chunks(batch, prefills, budget)
        for index in sorted(range(len(prefills)), key=lambda index: chunks[index] != 1):
            if chunks[index]:
                batch.prefill_pairs += pairs_of(prefills[index], chunks[index])
                batch.sequences.append(prefills[index])
                batch.slices.append(prefill_slice(prefills[index], chunks[index]))
        batch.num_tokens += sum(chunks)
