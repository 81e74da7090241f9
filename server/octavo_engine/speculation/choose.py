"""Which way of guessing a replica's settings ask for."""

from __future__ import annotations

from collections.abc import Callable

from octavo_engine.config import EngineConfig
from octavo_engine.messages import ModelInfo
from octavo_engine.runner.interface import ModelRunner
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.speculation.draft_model import DraftModel, check_vocabulary
from octavo_engine.speculation.proposer import PromptLookup, Proposer
from octavo_engine.speculation.speculator import Speculator


def choose_speculator(
    config: EngineConfig,
    model: ModelInfo,
    scheduler: Scheduler,
    draft: ModelRunner | None,
    clock: Callable[[], float],
) -> Speculator | None:
    """None without `num_speculative_tokens`; raises `ConfigError` for a draft model that does not fit."""
    if not config.num_speculative_tokens:
        return None
    proposer: Proposer = PromptLookup()
    if draft is not None:
        check_vocabulary(draft.info, model)
        proposer = DraftModel(draft, scheduler.limits.max_num_batched_tokens, clock)
    return Speculator(config.num_speculative_tokens, scheduler.step_time, proposer, clock)
