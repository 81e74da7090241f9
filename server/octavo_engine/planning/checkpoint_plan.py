"""A plan for a checkpoint on disk."""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.planning.capacity import DevicePlan, plan_with_fixes
from octavo_engine.planning.measuring import Footprint, measure


def plan_checkpoint(
    path: Path, config: EngineConfig, device: torch.device, memory_bytes: int, *, elsewhere: bool
) -> DevicePlan:
    """As `plan_with_fixes`, each footprint measured once. elsewhere: the device is not here."""

    @functools.cache
    def footprint(quantization: str, kv_cache_dtype: str, max_model_len: int, tensor: int) -> Footprint:
        changed = msgspec.structs.replace(
            config,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor,
        )
        return measure(path, changed, device, elsewhere=elsewhere)

    def measured(of: EngineConfig) -> Footprint:
        return footprint(of.quantization, of.kv_cache_dtype, of.max_model_len, of.tensor_parallel_size)

    return plan_with_fixes(path.name, config, measured, device.type, memory_bytes)
