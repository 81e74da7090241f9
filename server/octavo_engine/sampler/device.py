"""Choice by one kernel, where a backend has one: no sort, one pass for greedy and random rows.

Same filters as `filters.py`, in the same order, typical-p aside; other draws, because the kernel adds Gumbel noise to
the logits instead of inverting the distribution function. Both depend on the request's seed and the token's index
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.staging import to_device
from octavo_kernels import ops
from octavo_kernels.registry import REFERENCE

_SIGN = 1 << 63


def sample_on_device(
    logits: torch.Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], indices: Sequence[int]
) -> torch.Tensor | None:
    """One token a row, [R] int64, negative as in `ops.sample` for rows that fail; None where no backend has a kernel.

    logits: [R, V] float32, processed. seeds, indices: the request's seed and the index of its next output token.
    A row that asks for typical-p gets a token that ignores it: the caller draws that row again.
    """
    settings = (logits,) * 6  # a backend decides by the logits alone: nothing is moved to the device to ask it
    if ops.sample.backend_for(logits, *settings) == REFERENCE:
        return None
    reals = np.array([[p.temperature, p.top_p, p.min_p] for p in params], dtype=np.float32).T
    limits = np.array([p.top_k for p in params], dtype=np.int32)
    counters = np.array([[_signed(seed) for seed in seeds], indices], dtype=np.int64)
    (temperature, top_p, min_p), top_k, (seed, counter) = to_device((reals.copy(), limits, counters), logits.device)
    return ops.sample(logits, temperature, top_k, top_p, min_p, seed, counter)


def _signed(seed: int) -> int:
    """The 64 bits of a seed as a signed number."""
    seed %= 1 << 64
    return seed - (1 << 64) if seed >= _SIGN else seed
