"""Choice by one kernel, where a backend has one: no sort, one pass for greedy and random rows.

Same filters as `filters.py`, in the same order, typical-p aside; other draws, because the kernel adds Gumbel noise to
the logits instead of inverting the distribution function. Both depend on the request's seed and the token's index
alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.staging import numbers, to_device
from octavo_kernels import ops
from octavo_kernels.registry import REFERENCE

_SIGN = 1 << 63


class DeviceSampling:
    """Settings stay on the device as long as the batch is made of the same sequences."""

    def __init__(self) -> None:
        self._params: Sequence[SamplingParams] = ()
        self._seeds: Sequence[int] = ()
        self._settings: tuple[torch.Tensor, ...] = ()

    def sample(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], indices: Sequence[int]
    ) -> torch.Tensor | None:
        """One token a row, [R] int64, negative as in `ops.sample` for rows that fail; None without a kernel.

        logits: [R, V] float32, processed. seeds, indices: the request's seed and the index of its next output token.
        A row that asks for typical-p gets a token that ignores it: the caller draws that row again.
        """
        ask = (logits,) * 6  # a backend decides by the logits alone: nothing is moved to the device to ask it
        if ops.sample.backend_for(logits, *ask) == REFERENCE:
            return None
        if not self._holds(logits.device, params, seeds):
            reals = np.array([[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]])
            limits = np.array([p.top_k for p in params], dtype=np.int32)
            wide_seeds = np.array([_signed(seed) for seed in seeds], dtype=np.int64)
            on_device = to_device((reals.astype(np.float32), limits, wide_seeds), logits.device)
            self._settings = (*on_device[0].unbind(), *on_device[1:])
            self._params, self._seeds = params, seeds
        temperature, top_p, min_p, top_k, seed = self._settings
        return ops.sample(logits, temperature, top_k, top_p, min_p, seed, numbers(indices, logits.device, np.int64))

    def _holds(self, device: torch.device, params: Sequence[SamplingParams], seeds: Sequence[int]) -> bool:
        """Whether the settings are these; the same objects, for comparing them by value costs more than it saves."""
        if len(params) != len(self._params) or seeds != self._seeds or self._settings[0].device != device:
            return False
        return all(map(operator.is_, params, self._params))


def _signed(seed: int) -> int:
    """The 64 bits of a seed as a signed number."""
    seed %= 1 << 64
    return seed - (1 << 64) if seed >= _SIGN else seed
