"""A whole native step gives the logits that the same decoder gives op by op on the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kernels.cpu.random_decoder import HEAD_DIM, HIDDEN, KV_HEADS, VOCAB, post_normed, random_plan, reference_step
from kernels.cpu.test_native_attention import random_batch, random_cache
from octavo_kernels.batch import PagedKVCache
from octavo_kernels.cpu.bindings import NativeError
from octavo_kernels.cpu.step import PHASES, NativeStep
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.step import DecoderPlan, UnsupportedPlanError


def run_both(plan: DecoderPlan, kv_dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (native, reference) of a batch of three decodes and two prefills, one of them continued."""
    torch.manual_seed(seed)
    step = NativeStep(plan)
    batch, blocks = random_batch([5, 200, 33, 40, 70], [1, 1, 1, 40, 21], 16)
    caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, kv_dtype) for _ in plan.layers]
    copies = copies_of(caches)
    ids = torch.randint(0, VOCAB, (batch.num_tokens,))
    wanted = torch.tensor([0, 1, 2, 42, 50, 63])
    native = step(ids, batch, caches, wanted)
    return native, reference_step(plan, ids, batch, copies, wanted)


def copies_of(caches: Sequence[PagedKVCache]) -> list[PagedKVCache]:
    """What a step may write to without the next one seeing it."""
    return [
        PagedKVCache(
            cache.key.clone(),
            cache.value.clone(),
            None if cache.key_scale is None else cache.key_scale.clone(),
            None if cache.value_scale is None else cache.value_scale.clone(),
        )
        for cache in caches
    ]


FORMS = (GGMLType.Q4_1, GGMLType.Q6_K, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("particular", "parts"), itertools.product((False, True), repeat=2))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_steps_equal_thereference_step(
    isa: str, form: GGMLType | torch.dtype, particular: bool, parts: bool
) -> None:
    torch.manual_seed(11)
    plan = random_plan(form, dtype=torch.float32, particular=particular, parts=parts)
    native, expected = run_both(plan, torch.float32, seed=1)
    torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_sixteen_bit_steps_stay_close(isa: str, form: GGMLType | torch.dtype, kv_dtype: torch.dtype) -> None:
    torch.manual_seed(12)
    plan = random_plan(form, dtype=torch.bfloat16, particular=False, parts=False)
    native, expected = run_both(plan, kv_dtype, seed=2)
    error = (native - expected).norm() / expected.norm()
    assert error < 0.05, f"relative error {error:.3f}"


@pytest.mark.parametrize("particular", [False, True])
def test_norms_after_blocks_and_over_all_heads(isa: str, particular: bool) -> None:
    torch.manual_seed(17)
    plan = post_normed(random_plan(torch.float32, dtype=torch.float32, particular=particular, parts=False))
    native, expected = run_both(plan, torch.float32, seed=3)
    torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_step_continues_from_the_cache_it_wrote(isa: str) -> None:
    """Token by token and all at once give the same last logits."""
    torch.manual_seed(13)
    plan = random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False)
    ids = torch.randint(0, VOCAB, (21,))
    whole, blocks = random_batch([21], [21], 4)
    step = NativeStep(plan)
    caches = [random_cache(blocks, KV_HEADS, 4, HEAD_DIM, torch.float32) for _ in plan.layers]
    at_once = step(ids, replace(whole, num_decodes=0), caches, torch.tensor([20]))
    for i in range(21):
        alone = replace(
            whole,
            positions=whole.positions[i : i + 1],
            slot_mapping=whole.slot_mapping[i : i + 1],
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([i + 1], dtype=torch.int32),
            num_decodes=1,
            max_query_len=1,
            max_seq_len=i + 1,
        )
        logits = step(ids[i : i + 1], alone, caches, torch.tensor([0]))
    torch.testing.assert_close(logits, at_once, rtol=1e-4, atol=1e-4)


def test_inputs_out_of_range_are_refused_by_name(isa: str) -> None:
    torch.manual_seed(14)
    step = NativeStep(random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False))
    batch, blocks = random_batch([3], [3], 16)
    caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, torch.float32) for _ in range(2)]
    wanted = torch.tensor([2])
    with pytest.raises(NativeError, match=f"id of token 1 is {VOCAB}"):
        step(torch.tensor([0, VOCAB, 0]), batch, caches, wanted)
    with pytest.raises(NativeError, match="logits index of token 0 is 3"):
        step(torch.tensor([0, 1, 2]), batch, caches, torch.tensor([3]))
    with pytest.raises(ValueError, match="2 layers"):
        step(torch.tensor([0, 1, 2]), batch, caches[:1], wanted)


def test_a_profile_names_where_the_time_went(isa: str) -> None:
    torch.manual_seed(15)
    step = NativeStep(random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False))
    batch, blocks = random_batch([3], [3], 16)
    caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, torch.float32) for _ in range(2)]
    step.profile(True)
    step(torch.tensor([0, 1, 2]), batch, caches, torch.tensor([2]))
    spent = step.profile(False)
    assert tuple(spent) == PHASES
    assert spent["gate_up"] > 0


def test_what_the_step_cannot_run_is_said(isa: str) -> None:
    torch.manual_seed(16)
    plan = random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False)
    with pytest.raises(UnsupportedPlanError, match="float16"):
        NativeStep(replace(plan, lm_head=torch.randn(VOCAB, HIDDEN).half()))
    with pytest.raises(UnsupportedPlanError, match="head_dim 24"):
        NativeStep(replace(plan, head_dim=24))
    narrow = replace(plan.layers[0], q_norm=torch.ones(48))
    with pytest.raises(UnsupportedPlanError, match=r"over \(48, None\) numbers"):
        NativeStep(replace(plan, layers=(narrow, plan.layers[1])))
    with pytest.raises(UnsupportedPlanError, match="ends before position 601"):
        NativeStep(replace(plan, max_positions=601))
