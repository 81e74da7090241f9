"""Bounds of a step and of the queue."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError

DEFAULT_BATCHED_TOKENS = {"cpu": 256, "cuda": 8_192}
ITL_STRETCH = 3.0
DEFAULT_ITL_TARGET_S = {"cpu": 0.2, "cuda": 0.05}


class PreemptionMode(enum.StrEnum):
    """`AUTO` takes the cheaper way each time."""

    AUTO = "auto"
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """See `EngineConfig` for the fields of the same name.

    A sequence that does not fit may be overtaken by at most `max_overtakes` later ones, looking no further than
    `overtake_window` sequences behind it. Admission leaves blocks free for the growth of running sequences: the
    greater of `watermark`, a share of all blocks, and `growth_reserve`, a share of the growth that is expected.
    Prefills may stretch a step to `itl_stretch` times what its decodes alone take (0: any), errors of the model of step
    times included, and to `itl_target_s`.
    `max_logits_rows` bounds the positions of a step whose logits are kept for prompt log-probabilities. Beside running
    decodes a step gets at least `min_prefill_tokens` of prefill, whatever the latency target says. A sequence waits
    while another one computes `min_coming_blocks` or more of its own prefix: soon they come from the cache; at
    most `deferral_window` do so at a time.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_partial_prefills: int = 4
    max_queued_requests: int = 1_024
    max_queued_tokens: int = 1_000_000
    itl_target_s: float = 0.0
    itl_stretch: float = 0.0
    ageing_s: float = 10.0
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    min_prefill_tokens: int = 4
    first_prefill_tokens: int = 64
    max_step_s: float = 6.25
    max_overtakes: int = 32
    overtake_window: int = 8
    watermark: float = 0.01
    growth_reserve: float = 0.5
    max_logits_rows: int = 512
    min_coming_blocks: int = 4
    deferral_window: int = 16
    preemption_mode: PreemptionMode = PreemptionMode.AUTO


def limits_for(config: EngineConfig, device: str) -> SchedulerLimits:
    """The scheduler's bounds from the replica's settings; raises `ConfigError` for a budget that starves prefills."""
    kind = device.partition(":")[0]
    budget = config.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS.get(kind, 256), 2 * config.max_num_seqs)
    if budget <= config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: must be above max_num_seqs ({config.max_num_seqs}), got {budget}; "
            "every running sequence needs one token a step, and prefills need room beside them"
        )
    return SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        max_num_partial_prefills=config.max_num_partial_prefills,
        itl_target_s=config.itl_target_s or DEFAULT_ITL_TARGET_S.get(kind, 0.2),
        itl_stretch=0.0 if config.itl_target_s else ITL_STRETCH,
        max_step_s=config.step_timeout_s / 4,
        ageing_s=config.priority_ageing_s,
        tenant_weights=config.tenant_weights,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        preemption_mode=PreemptionMode(config.preemption_mode),
    )
