"""What the scheduler holds between two steps, for people who ask why something waits."""

from __future__ import annotations

import time

from octavo_engine.messages import SchedulerSnapshot, SequenceSnapshot
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.sequence import Sequence, SequenceState

MAX_SNAPSHOT_SEQUENCES = 1_000


def scheduler_snapshot(scheduler: Scheduler, now: float) -> SchedulerSnapshot:
    """now: on the clock that gave the sequences their arrival."""
    sequences = scheduler.sequences()
    running = sorted((seq for seq in sequences if seq.state is SequenceState.RUNNING), key=lambda seq: seq.rank)
    waiting = sorted((seq for seq in sequences if seq.state is SequenceState.WAITING), key=lambda seq: seq.rank)
    shown = [*running, *waiting][:MAX_SNAPSHOT_SEQUENCES]
    pool, fairness = scheduler.blocks.pool, scheduler.fairness
    return SchedulerSnapshot(
        time=time.time(),
        num_running=len(running),
        num_waiting=len(waiting),
        kv_blocks_free=pool.num_free,
        kv_blocks_total=pool.num_blocks,
        step_seconds=scheduler.step_time.seconds,
        virtual_tokens={tenant: fairness.service(tenant) for tenant in sorted({seq.tenant for seq in shown})},
        sequences=[_describe(seq, now) for seq in shown],
        num_left_out=len(sequences) - len(shown),
    )


def _describe(seq: Sequence, now: float) -> SequenceSnapshot:
    began = now if seq.first_scheduled_s is None else seq.first_scheduled_s
    return SequenceSnapshot(
        request_id=seq.request_id,
        tenant=seq.tenant,
        adapter="" if seq.adapter is None else seq.adapter.adapter.name,
        state=seq.state.value,
        priority=seq.priority,
        age_s=now - seq.arrival_s,
        queue_time_s=began - seq.arrival_s,
        deadline_in_s=None if seq.deadline_s is None else seq.deadline_s - now,
        num_prompt=seq.num_prompt_tokens,
        num_output=seq.num_output_tokens,
        num_computed=seq.num_computed,
        num_cached=seq.num_cached_tokens,
        num_blocks=len(seq.table.blocks),
        num_preemptions=seq.num_preemptions,
        num_overtaken=seq.num_overtaken,
    )
