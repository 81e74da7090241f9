"""Copying whole blocks of the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.batch import PagedKVCache
from octavo_kernels.triton.environment import runs_here

BLOCK = 1_024  # 8-byte words a program copies


@triton.jit(do_not_specialize=["from_rows", "to_rows"])
def _copy_rows_kernel(
    from_ptr, to_ptr, sources_ptr, destinations_ptr, from_rows, to_rows, words,
    GATHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GATHER: to[i] = from[sources[i]]; otherwise to[destinations[i]] = from[i]."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source, destination = tl.load(sources_ptr + pair), tl.load(destinations_ptr + pair)
    if GATHER:
        inside = (source >= 0) & (source < from_rows)
        destination = pair
    else:  # a pair with a source outside the cache was not gathered: leave its destination alone
        inside = (destination >= 0) & (destination < to_rows) & (source >= 0) & (source < to_rows)
        source = pair
    if inside:
        mask = columns < words
        tl.store(to_ptr + destination * words + columns, tl.load(from_ptr + source * words + columns, mask=mask), mask)


def _supports(cache: PagedKVCache, sources: torch.Tensor, destinations: torch.Tensor) -> bool:
    return runs_here(cache.key) and all(
        x is None or (x.is_contiguous() and x[0].nbytes % 8 == 0)
        for x in (cache.key, cache.value, cache.key_scale, cache.value_scale)
    )


@ops.copy_blocks.register("triton", supports=_supports)
def copy_blocks(cache: PagedKVCache, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Gathers into a staging buffer, then scatters: whether sources and destinations overlap is never asked, so the
    host never waits for the device. Pairs with an id outside the cache are ignored."""
    pairs = sources.numel()
    if pairs == 0:
        return
    for stored in (cache.key, cache.value, cache.key_scale, cache.value_scale):
        if stored is None:
            continue
        words = stored.view(stored.shape[0], -1).view(torch.int64)
        staged = torch.empty((pairs, words.shape[1]), dtype=torch.int64, device=words.device)
        rows, width = words.shape
        grid = (pairs, triton.cdiv(width, BLOCK))
        _copy_rows_kernel[grid](words, staged, sources, destinations, rows, pairs, width, GATHER=True, BLOCK=BLOCK)
        _copy_rows_kernel[grid](staged, words, sources, destinations, pairs, rows, width, GATHER=False, BLOCK=BLOCK)
