"""The memory of the paged KV cache."""

from __future__ import annotations

import math
import mmap

import torch

from octavo_kernels.batch import PagedKVCache

SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, with the scales of 8-bit forms."""
    scale = 4 if dtype in SCALED_DTYPES else 0
    return 2 * num_layers * num_kv_heads * (head_dim * dtype.itemsize + scale)


def new_kv_cache(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> PagedKVCache:
    """One layer's cache, all zeros. shape: [num_blocks, num_kv_heads, block_size, head_dim].

    Raises `OSError` or `RuntimeError` when the memory is not to be had.
    """
    key, value = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
    if dtype not in SCALED_DTYPES:
        return PagedKVCache(key, value)
    scales = [_zeros(shape[:3], torch.float32, device) for _ in range(2)]
    return PagedKVCache(key, value, *scales)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU the pages come from the system when they are first written: an idle cache costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
