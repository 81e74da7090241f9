"""The memory of the paged KV cache."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch

from octavo_engine.errors import ConfigError
from octavo_kernels.batch import PagedKVCache

SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a model caches of each token, in each of `num_layers` layers. Keys and values may differ in width.

    value_dim 0: values are a part of the keys (latent attention), which then have no 8-bit form.
    """

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers, with the scales of 8-bit forms.

        Raises `ConfigError` for a form the layout does not have.
        """
        if dtype in SCALED_DTYPES and not self.value_dim:
            raise ConfigError("kv_cache_dtype: latent attention caches no 8-bit numbers; use auto or bfloat16")
        scales = 8 if dtype in SCALED_DTYPES else 0
        width = (self.key_dim + self.value_dim) * dtype.itemsize + scales
        return self.num_layers * self.num_kv_heads * width

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> PagedKVCache:
        """One layer's cache, all zeros. Raises `OSError` or `RuntimeError` when the memory is not to be had."""
        shape = (num_blocks, self.num_kv_heads, block_size)
        key, value = (_zeros((*shape, dim), dtype, device) for dim in (self.key_dim, self.value_dim))
        if dtype not in SCALED_DTYPES:
            return PagedKVCache(key, value)
        scales = [_zeros(shape, torch.float32, device) for _ in range(2)]
        return PagedKVCache(key, value, *scales)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU the pages come from the system when they are first written: an idle cache costs nothing."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
