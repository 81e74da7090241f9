"""The engine core: requests in, one step at a time, tokens out. No process, no socket, no clock but the one given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.engine_stats import engine_stats
from octavo_engine.errors import InvalidRequestError, RequestFailedError
from octavo_engine.intake import Intake
from octavo_engine.isolation import run_isolated
from octavo_engine.kv.events import KVEventBatch, KVEventLog
from octavo_engine.kv.tiers import block_manager
from octavo_engine.lora.manager import AdapterManager
from octavo_engine.messages import (
    AddRequest,
    EmbedRequest,
    EngineStats,
    FinishReason,
    LoadAdapter,
    ModelInfo,
    SchedulerSnapshot,
    StepOutput,
    UnloadAdapter,
)
from octavo_engine.outcomes import Outcomes
from octavo_engine.prompt import check_prompt
from octavo_engine.roofline import Roofline
from octavo_engine.runner.interface import ModelRunner, SequenceSlice
from octavo_engine.sampler.logprobs import token_logprobs
from octavo_engine.sampler.sampler import Sampler
from octavo_engine.sampler.state import SamplerState
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.limits import limits_for
from octavo_engine.scheduler.preemption import CopyTime
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.sequence import Sequence as Seq
from octavo_engine.scheduler.snapshot import scheduler_snapshot
from octavo_engine.speculation.choose import choose_speculator
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_engine.tokenizer.load import load_tokenizer


class EngineCore:
    """Schedules, computes and samples over a loaded runner whose KV cache is allocated.

    A request that cannot be computed ends alone with `FinishReason.ERROR`; only a runner that fails on everything
    ends the engine, with `isolation.StepFailedError` out of `step`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        tokenizer: Callable[[], Tokenizer] | None = None,
        roofline: Roofline | None = None,
        draft: ModelRunner | None = None,
    ) -> None:
        info = runner.info
        self._runner = runner
        self._config = config
        self._clock = clock
        self._roofline = roofline
        self._max_model_len = effective_max_model_len(info)
        self.model = msgspec.structs.replace(info, max_model_len=self._max_model_len)
        block_size = info.kv_block_size or config.block_size
        self._kv_events: KVEventLog | None = None
        if config.kv_events_endpoint:
            self._kv_events = KVEventLog(block_size, tells_tokens=config.kv_events_token_ids)
        blocks = block_manager(config, info, block_size, self._kv_events)
        self.pool = blocks.pool
        self.adapters = AdapterManager(runner, config) if config.enable_lora else None
        self.scheduler = Scheduler(
            limits_for(config, info.device),
            blocks,
            None if self.adapters is None else self.adapters.slots,
            CopyTime(info.kv_bytes_per_token * block_size),
        )
        self.scheduler.speculator = choose_speculator(config, self.model, self.scheduler, draft, clock)
        load = tokenizer or (lambda: load_tokenizer(info.path))
        self._intake = Intake(runner, self.model, config, self.scheduler, self.adapters, load)
        self._outcomes = Outcomes(self.scheduler, self.adapters, self._max_model_len)
        self._sampler = Sampler()
        self._num_steps = 0
        self._step_time_s = 0.0

    @property
    def has_work(self) -> bool:
        intake = self._intake
        return self.scheduler.has_work or bool(intake.embeddings or intake.grammars or self._outcomes or self.adapters)

    def add(self, request: AddRequest) -> None:
        """Queue a sequence. Raises `InvalidRequestError` or `QueueFullError`."""
        self._intake.add(request, self._clock())

    def load_adapter(self, command: LoadAdapter) -> None:
        """Begin to load an adapter; an output says how it went. Raises `InvalidRequestError`."""
        self._adapter_manager().load(command)

    def unload_adapter(self, command: UnloadAdapter) -> None:
        """Forget an adapter once it is unused; an output says when. Raises `InvalidRequestError`."""
        self._adapter_manager().unload(command)

    def add_embedding(self, request: EmbedRequest) -> None:
        """Queue a text to pool. Raises `InvalidRequestError` or `QueueFullError`."""
        self._intake.add_embedding(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these sequences now; their blocks are free when this returns. Unknown ids are ignored."""
        for request_id in request_ids:
            seq = self.scheduler.get(request_id)
            if seq is not None:
                self._outcomes.finish(seq, FinishReason.ABORT)
            else:
                self._intake.remove(request_id)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running sequences go on."""
        self.pool.reset_cache()
        if self.scheduler.blocks.host is not None:
            self.scheduler.blocks.host.pool.reset_cache()

    def snapshot(self) -> SchedulerSnapshot:
        """Which sequences run and wait, and where each stands."""
        return scheduler_snapshot(self.scheduler, self._clock())

    def step(self) -> StepOutput:
        """Compute one batch. Raises `StepFailedError` when the runner itself is broken."""
        started = self._clock()
        for seq in self.scheduler.pop_expired(started):
            self._outcomes.finish(seq, FinishReason.DEADLINE)
        if self._intake.grammars:
            self._outcomes.add(self._intake.take_compiled())
        if self._intake.embeddings:
            self._outcomes.add(self._intake.embeddings.step())
        if self.adapters:
            self._outcomes.add(self.adapters.step(wait_for_one=not self.scheduler.has_work))
        batch = self.scheduler.schedule(started)
        self._move_blocks()
        if self.adapters is not None:
            for slot, adapter in self.adapters.slots.take_placements():
                self._runner.place_adapter(slot, adapter)
        if batch.slices:
            self._compute(batch)
        outputs = self._outcomes.take()
        self._num_steps += 1
        self._step_time_s = self._clock() - started
        return StepOutput(outputs=outputs, stats=self.stats())

    def heartbeat(self) -> None:
        """While there is no work: is all the model needs still there? Raises `EngineDeadError`."""
        self._runner.heartbeat()

    def _move_blocks(self) -> None:
        """Carry out the copies that scheduling decided on, before anything overwrites their sources."""
        host = self.scheduler.blocks.host
        if host is None or not host.has_transfers:
            return
        transfers = host.take_transfers()
        started = self._clock()
        for transfer in transfers:
            self._runner.move_blocks(transfer)
        self.scheduler.preemption.copy.observe(sum(map(len, transfers)), self._clock() - started)

    def take_kv_events(self) -> KVEventBatch | None:
        """What became of cached blocks since the last call; None if nothing did, or if nobody wants to know."""
        return None if self._kv_events is None else self._kv_events.take()

    def kv_snapshot(self) -> KVEventBatch:
        """The labelled prefixes that are cached, once all events are taken."""
        return KVEventBatch(ts=time.time(), events=[]) if self._kv_events is None else self._kv_events.snapshot()

    def stats(self) -> EngineStats:
        return engine_stats(
            self.scheduler, self._intake, self._outcomes, self._roofline, self._num_steps, self._step_time_s
        )

    def check_prompt(self, prompt: Sequence[int], room: int = 1) -> None:
        """Raise `InvalidRequestError` for a prompt that cannot run with `room` more tokens."""
        check_prompt(prompt, self.model, room)

    def _adapter_manager(self) -> AdapterManager:
        if self.adapters is None:
            raise InvalidRequestError("this engine runs without adapters; start it with enable_lora", "lora_name")
        return self.adapters

    def _compute(self, batch: Batch) -> None:
        started = self._clock()
        parts, failed = run_isolated(self._runner, batch, self.pool)
        for seq, error in failed:
            self._outcomes.fail(seq, RequestFailedError(f"the model could not compute this request: {error}"))
        for part, logits in parts:
            self._sample(part, logits)
        if not failed:
            seconds = self._clock() - started
            self.scheduler.observe(batch, seconds)
            if self._roofline is not None:
                self._roofline.observe(batch.load, batch.num_logits, seconds)

    def _sample(self, part: Batch, logits: torch.Tensor) -> None:
        """Choose and append the next tokens of the sequences whose last position a step has reached."""
        rows: list[int] = []
        states: list[SamplerState] = []
        ahead: list[int] = []
        sampled_seqs: list[Seq] = []
        end_row = 0
        for seq, piece in zip(part.sequences, part.slices, strict=True):
            end_row += piece.num_logits
            if seq.wants_prompt_logprobs:
                self._add_prompt_logprobs(seq, piece, logits[end_row - piece.num_logits : end_row])
            if seq.drafted:
                count = piece.num_logits
                rows.extend(range(end_row - count, end_row))
                states.extend([seq.sampler] * count)
                ahead.extend(range(count))
            else:
                self.scheduler.advance(seq, len(piece.token_ids))
                if not piece.num_logits or seq.num_computed != len(seq.tokens):
                    continue
                rows.append(end_row - 1)
                states.append(seq.sampler)
                ahead.append(0)
            sampled_seqs.append(seq)
        if not rows:
            return
        sampled = self._sampler.sample(logits if len(rows) == end_row else logits[rows], states, ahead)
        row = 0
        for seq in sampled_seqs:
            count = 1 + len(seq.drafted)
            entries = sampled.logprobs[row : row + count] if sampled.logprobs is not None else [None] * count
            self._outcomes.append_verified(seq, sampled.token_ids[row : row + count], entries)
            row += count

    def _add_prompt_logprobs(self, seq: Seq, piece: SequenceSlice, logits: torch.Tensor) -> None:
        """Row j of a slice's logits predicts position `start + j + 1`; only prompt positions are reported."""
        if piece.start == 0:
            seq.prompt_logprobs = [None]
        targets = seq.tokens[piece.start + 1 : min(piece.start + len(piece.token_ids) + 1, seq.num_prompt_tokens)]
        if targets:
            num_top = [seq.sampling.prompt_logprobs or 0] * len(targets)
            seq.prompt_logprobs.extend(token_logprobs(logits[: len(targets)], targets, num_top))


def effective_max_model_len(model: ModelInfo) -> int:
    """The longest sequence that can run: the model's context, or the whole KV cache if that is smaller."""
    if model.task != "generate":
        return model.max_model_len
    return min(model.max_model_len, model.kv_blocks_total * model.kv_block_size)
