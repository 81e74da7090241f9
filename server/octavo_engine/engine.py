"""The engine core: requests in, one step at a time, tokens out. No process, no socket, no clock but the one given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from octavo_engine.config import EngineConfig
from octavo_engine.engine_stats import engine_stats
from octavo_engine.errors import InvalidRequestError
from octavo_engine.intake import Intake
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
from octavo_engine.runner.interface import ModelRunner, StagedRunner
from octavo_engine.scheduler.limits import limits_for
from octavo_engine.scheduler.preemption import CopyTime
from octavo_engine.scheduler.scheduler import Scheduler, WaitReason
from octavo_engine.scheduler.snapshot import scheduler_snapshot
from octavo_engine.speculation.choose import choose_speculator
from octavo_engine.stepping.device_queue import DeviceQueue, queue_for, runs_ahead
from octavo_engine.stepping.pipeline import StepPipeline
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
        queue: DeviceQueue | None = None,
    ) -> None:
        info = runner.info
        self._runner = runner
        self._clock = clock
        self._roofline = roofline
        self.model = msgspec.structs.replace(info, max_model_len=effective_max_model_len(info))
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
        self._outcomes = Outcomes(self.scheduler, self.adapters)
        ahead = runs_ahead(config, info)
        stages = runner if ahead and isinstance(runner, StagedRunner) and runner.num_stages > 1 else None
        if self.scheduler.speculator is not None:
            stages = None  # what to guess depends on the tokens in flight
        if stages is not None:
            self.scheduler.num_stages = stages.num_stages
        self._steps = StepPipeline(
            runner,
            self.scheduler,
            self._outcomes,
            queue or queue_for(info.device, ahead=ahead, staged=stages is not None),
            clock,
            roofline,
            runs_ahead=ahead,
            stages=stages,
        )
        self._num_steps = 0
        self._step_time_s = 0.0

    @property
    def has_work(self) -> bool:
        intake = self._intake
        return self.scheduler.has_work or bool(
            intake.embeddings or intake.grammars or self._outcomes or self.adapters or self._steps.num_in_flight
        )

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
        """End these sequences now; their blocks are free when this returns, or after the next `step` where one is in
        flight. Unknown ids are ignored."""
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
        """Launch one batch, and take in what was launched before: the same one, unless `async_scheduling` is on.

        Raises `StepFailedError` when the runner itself is broken.
        """
        started = self._clock()
        for seq in self.scheduler.pop_expired(started):
            self._outcomes.finish(seq, FinishReason.DEADLINE)
        if self._intake.grammars:
            self._outcomes.add(self._intake.take_compiled())
        if self._intake.embeddings:
            self._steps.settle(WaitReason.EMBEDDINGS)
            self._outcomes.add(self._intake.embeddings.step())
        if self.adapters:
            self._outcomes.add(self.adapters.step(wait_for_one=not self.scheduler.has_work))
        self._steps.make_ready()
        batch = self.scheduler.schedule(started)
        self._move_blocks()
        self._place_adapters()
        self._steps.advance(batch)
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
        self._steps.settle(WaitReason.HOST_MEMORY)
        transfers = host.take_transfers()
        started = self._clock()
        for transfer in transfers:
            self._runner.move_blocks(transfer)
        self.scheduler.preemption.copy.observe(sum(map(len, transfers)), self._clock() - started)

    def _place_adapters(self) -> None:
        placements = self.adapters.slots.take_placements() if self.adapters is not None else []
        if placements:
            self._steps.settle(WaitReason.ADAPTERS)
        for slot, adapter in placements:
            self._runner.place_adapter(slot, adapter)

    def take_kv_events(self) -> KVEventBatch | None:
        """What became of cached blocks since the last call; None if nothing did, or if nobody wants to know."""
        return None if self._kv_events is None else self._kv_events.take()

    def kv_snapshot(self) -> KVEventBatch:
        """The labelled prefixes that are cached, once all events are taken."""
        return KVEventBatch(ts=time.time(), events=[]) if self._kv_events is None else self._kv_events.snapshot()

    def stats(self) -> EngineStats:
        return engine_stats(
            self.scheduler,
            self._intake,
            self._outcomes,
            self._steps,
            self._roofline,
            self._num_steps,
            self._step_time_s,
        )

    def check_prompt(self, prompt: Sequence[int], room: int = 1) -> None:
        """Raise `InvalidRequestError` for a prompt that cannot run with `room` more tokens."""
        check_prompt(prompt, self.model, room)

    def _adapter_manager(self) -> AdapterManager:
        if self.adapters is None:
            raise InvalidRequestError("this engine runs without adapters; start it with enable_lora", "lora_name")
        return self.adapters


def effective_max_model_len(model: ModelInfo) -> int:
    """The longest sequence that can run: the model's context, or the whole KV cache if that is smaller."""
    if model.task != "generate":
        return model.max_model_len
    return min(model.max_model_len, model.kv_blocks_total * model.kv_block_size)
