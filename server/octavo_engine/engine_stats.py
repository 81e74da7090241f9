"""The engine's counters and gauges, read from the parts that keep them."""

from __future__ import annotations

import time

from octavo_engine.intake import Intake
from octavo_engine.messages import EngineStats
from octavo_engine.outcomes import Outcomes
from octavo_engine.roofline import Roofline
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.speculation.speculator import Speculator
from octavo_engine.stepping.pipeline import StepPipeline


def engine_stats(
    scheduler: Scheduler,
    intake: Intake,
    outcomes: Outcomes,
    steps: StepPipeline,
    roofline: Roofline | None,
    num_steps: int,
    step_time_s: float,
) -> EngineStats:
    """A snapshot. step_time_s: what the last of `num_steps` steps took."""
    speculator, adapters, pool = scheduler.speculator, scheduler.adapters, scheduler.blocks.pool
    host = scheduler.blocks.host
    return EngineStats(
        step=num_steps,
        time=time.time(),
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting + len(intake.embeddings) + len(intake.grammars),
        queue_room=scheduler.queue_room - len(intake.embeddings) - len(intake.grammars),
        num_taken=intake.num_taken,
        num_waiting_tokens=scheduler.num_waiting_tokens + intake.embeddings.num_tokens,
        kv_blocks_total=pool.num_blocks,
        kv_blocks_used=pool.num_used,
        prefix_queries=scheduler.prefix_queries,
        prefix_hits=scheduler.prefix_hits,
        num_preemptions=scheduler.num_preemptions,
        prompt_tokens=outcomes.num_prompt_tokens + intake.embeddings.num_tokens_done,
        generation_tokens=outcomes.num_generated_tokens,
        requests_finished=dict(outcomes.num_finished),
        step_time_s=step_time_s,
        retry_after_s=scheduler.retry_after_s,
        queued_work_s=scheduler.queued_work_s,
        roofline_decode=roofline.decode if roofline is not None else 0.0,
        roofline_prefill=roofline.prefill if roofline is not None else 0.0,
        spec_drafts=speculator.num_drafts if speculator is not None else 0,
        spec_accepted_by_position=_by_position(speculator),
        spec_unavailable=speculator.proposer.unavailable if speculator is not None else "",
        spec_draft_tokens=speculator.num_drafted if speculator is not None else 0,
        spec_accepted_tokens=speculator.num_accepted if speculator is not None else 0,
        adapters=adapters.stats() if adapters is not None else [],
        host_blocks_total=host.pool.num_blocks if host is not None else 0,
        host_blocks_used=host.pool.num_used if host is not None else 0,
        host_blocks_cached=host.pool.num_cached if host is not None else 0,
        host_hits=scheduler.host_hits,
        host_blocks_stored=host.num_stored if host is not None else 0,
        host_blocks_fetched=host.num_fetched if host is not None else 0,
        num_preemptions_by_swap=scheduler.preemption.num_swapped,
        steps_ahead=steps.num_ahead,
        step_waits=steps.waits,
    )


def _by_position(speculator: Speculator | None) -> dict[str, int]:
    if speculator is None:
        return {}
    return {str(position): speculator.accepted_by_position[position] for position in range(speculator.max_tokens)}
