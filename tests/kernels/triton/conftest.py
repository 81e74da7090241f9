"""Triton kernels against their references: on a CUDA device where there is one, else under Triton's interpreter.

The interpreter multiplies bfloat16 operands as if they were integers, so these tests keep to float16 and float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.reference.kv_cache import quantize_kv
from octavo_kernels.registry import use_backends

POISON = 1e4


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def on_triton() -> Iterator[None]:
    """Ops dispatch to the Triton backend, which must be there."""
    from octavo_kernels import triton as backend

    assert backend.DESCRIPTION
    with use_backends("triton"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds large numbers and NaN, so that an element no kernel wrote shows."""
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() and x.dtype.itemsize > 1 else x.fill_(113)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(real_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(real_empty_like(*args, **kwargs)))


MakePaged = Callable[..., tuple[torch.Tensor, PagedKVCache, AttentionBatch]]


@pytest.fixture
def make_paged(device: torch.device) -> MakePaged:
    """A filled cache, a batch over it in shuffled blocks, and queries. Blocks no sequence owns hold NaN; table entries
    past a sequence's end point far outside the cache."""

    def make(
        lengths: list[tuple[int, int]],
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float16,
        kv_dtype: torch.dtype | None = None,
        shared_blocks: int = 0,
    ) -> tuple[torch.Tensor, PagedKVCache, AttentionBatch]:
        """lengths: (new tokens, length after the step) of each sequence, single tokens first."""
        needed = [-(-length // block_size) for _, length in lengths]
        num_blocks = sum(needed) + 3
        order = torch.randperm(num_blocks - 1) + 1
        key, value = (torch.randn(num_blocks, num_kv_heads, block_size, head_dim) for _ in range(2))
        tables = torch.full((len(lengths), max(needed) + 1), 2**30, dtype=torch.int32)
        used = 0
        for row, count in enumerate(needed):
            tables[row, :count] = order[used : used + count].int()
            tables[row, : min(shared_blocks, count)] = tables[0, : min(shared_blocks, count)]
            used += count
        unused = torch.ones(num_blocks, dtype=torch.bool)
        unused[order[:used]] = False
        cache = _cache(key, value, kv_dtype or dtype, unused)
        starts = torch.tensor([0, *torch.tensor([new for new, _ in lengths]).cumsum(0).tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(length - new, length) for new, length in lengths])
        batch = AttentionBatch(
            positions=positions,
            slot_mapping=torch.arange(len(positions)),
            query_start_loc=starts,
            seq_lens=torch.tensor([length for _, length in lengths], dtype=torch.int32),
            block_tables=tables,
            num_decodes=next((i for i, (new, _) in enumerate(lengths) if new != 1), len(lengths)),
            max_query_len=max(new for new, _ in lengths),
            max_seq_len=max(length for _, length in lengths),
        )
        query = torch.randn(len(positions), num_heads, head_dim, dtype=dtype)
        return query.to(device), _moved(cache, device), _moved(batch, device)

    return make


def _cache(key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, unused: torch.Tensor) -> PagedKVCache:
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        for x in (key, value):
            x[unused] = float("nan")
        return PagedKVCache(key.to(dtype), value.to(dtype))
    (key_codes, key_scale), (value_codes, value_scale) = (quantize_kv(x.flatten(0, 1), dtype) for x in (key, value))
    shape = key.shape
    scales = [x.view(shape[:3]) for x in (key_scale, value_scale)]
    for scale in scales:
        scale[unused] = float("nan")
    return PagedKVCache(key_codes.view(shape), value_codes.view(shape), *scales)


def _moved(value: PagedKVCache | AttentionBatch, device: torch.device):
    for name in value.__slots__:
        held = getattr(value, name)
        if isinstance(held, torch.Tensor):
            setattr(value, name, held.to(device))
    return value
