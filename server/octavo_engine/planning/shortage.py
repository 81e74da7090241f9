"""What is told when memory ends while a model is loaded: need, have and fixes instead of an allocator's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.kv.sizing import GIB
from octavo_engine.planning.capacity import DoesNotFitError
from octavo_engine.planning.checkpoint_plan import plan_checkpoint
from octavo_engine.runner.machine import choose_device, free_memory_bytes
from octavo_engine.storage import resolve

_CPU_ALLOCATOR = "can't allocate memory"  # torch has no exception of its own for a CPU's


@contextmanager
def shortage_explained(config: EngineConfig) -> Iterator[None]:
    """Turn an allocation that fails inside the block into a `ConfigError` with need, have and what to change."""
    if config.num_ranks > 1:  # other processes allocate, too, and say so in their own words
        yield
        return
    device = choose_device(config.device)
    memory_bytes = free_memory_bytes(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        raise _explanation(config, device, memory_bytes) from error


def _is_shortage(error: MemoryError | RuntimeError) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


def _explanation(config: EngineConfig, device: torch.device, memory_bytes: int) -> ConfigError:
    try:
        path = resolve(config.model, revision=config.revision)
        made = plan_checkpoint(path, config, device, memory_bytes, elsewhere=False)
    except DoesNotFitError as error:
        return error
    needed = made.weight_bytes + made.embedding_bytes + made.kv_bytes + made.activation_bytes
    return ConfigError(
        f"does not fit: memory ended while the model was loaded, of which {memory_bytes / GIB:.2f} GiB were free and "
        f"{needed / GIB:.2f} GiB should do; see what else takes memory, or lower kv_cache_memory_fraction"
    )
