"""Adapters in a whole native step: each token's own, nothing of anybody else's, against PEFT's formula in float32."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch

from kernels.cpu.random_decoder import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    VOCAB,
    random_plan,
    reference_step,
)
from kernels.cpu.test_native_attention import random_batch, random_cache
from kernels.cpu.test_native_step import copies_of
from octavo_kernels.cpu.step import NativeStep
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.step import DecoderPlan, LowRankChange, Projection

QUERY, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
PLACES = {
    "q": (Projection.QKV, 0, QUERY, HIDDEN),
    "k": (Projection.QKV, QUERY, KV, HIDDEN),
    "v": (Projection.QKV, QUERY + KV, KV, HIDDEN),
    "qkv": (Projection.QKV, 0, QUERY + 2 * KV, HIDDEN),
    "o": (Projection.OUTPUT, 0, HIDDEN, QUERY),
    "gate": (Projection.GATE_UP, 0, INNER, HIDDEN),
    "up": (Projection.GATE_UP, INNER, INNER, HIDDEN),
    "gate_up": (Projection.GATE_UP, 0, 2 * INNER, HIDDEN),
    "down": (Projection.DOWN, 0, HIDDEN, INNER),
}
SEPARATE, FUSED = ("q", "k", "v", "o", "gate", "up", "down"), ("qkv", "o", "gate_up", "down")


def random_change(layer: int, place: str, rank: int, dtype: torch.dtype) -> LowRankChange:
    projection, first, rows, columns = PLACES[place]
    down, up = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) / rank**0.5
    return LowRankChange(layer, projection, first, down.to(dtype), up.to(dtype), scale=0.7)


def random_adapters(dtype: torch.dtype) -> dict[int, list[LowRankChange]]:
    """Every projection at rank 8, fused ones at 40 (three panels), one projection of one layer at rank 1."""
    return {
        0: [random_change(layer, place, 8, dtype) for layer in range(2) for place in SEPARATE],
        1: [random_change(layer, place, 40, dtype) for layer in range(2) for place in FUSED],
        4: [random_change(1, "v", 1, dtype)],
    }


class Case:
    """A step of four decodes and three prefills over random caches, run natively and by the reference."""

    def __init__(self, plan: DecoderPlan, kv_dtype: torch.dtype) -> None:
        self.plan = plan
        self.step = NativeStep(plan)
        self.batch, blocks = random_batch([5, 200, 33, 12, 40, 70, 9], [1, 1, 1, 1, 40, 21, 3], 16)
        self.caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, kv_dtype) for _ in plan.layers]
        self.ids = torch.randint(0, VOCAB, (self.batch.num_tokens,))
        self.wanted = torch.arange(self.batch.num_tokens)

    def slots(self, by_sequence: Sequence[int]) -> torch.Tensor:
        lengths = self.batch.query_start_loc.diff()
        return torch.tensor(by_sequence, dtype=torch.int32).repeat_interleave(lengths)

    def native(self, slots: torch.Tensor | None) -> torch.Tensor:
        return self.step(self.ids, self.batch, copies_of(self.caches), self.wanted, slots)

    def expected(self, adapters: Mapping[int, Sequence[LowRankChange]], slots: torch.Tensor) -> torch.Tensor:
        return reference_step(self.plan, self.ids, self.batch, copies_of(self.caches), self.wanted, adapters, slots)


MIXED = (0, 1, -1, 0, 1, -1, 4)


@pytest.mark.parametrize(("particular", "parts"), itertools.product((False, True), repeat=2))
@pytest.mark.parametrize("by_sequence", [MIXED, (0,) * 7, (3, 2, -1, 0, 99, 1, 1)], ids=str)
def test_each_token_gets_its_own_adapter(isa: str, particular: bool, parts: bool, by_sequence: tuple[int, ...]) -> None:
    torch.manual_seed(21)
    plan = random_plan(torch.float32, dtype=torch.float32, particular=particular, parts=parts)
    case, adapters = Case(plan, torch.float32), random_adapters(torch.float32)
    for slot, changes in adapters.items():
        case.step.place_adapter(slot, changes)
    slots = case.slots(by_sequence)
    native, expected = case.native(slots), case.expected(adapters, slots)
    torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("form", [GGMLType.Q4_1, torch.bfloat16], ids=str)
def test_rows_without_adapters_are_the_same_to_the_last_bit(isa: str, form: GGMLType | torch.dtype) -> None:
    torch.manual_seed(22)
    case = Case(random_plan(form, dtype=torch.bfloat16, particular=False, parts=False), torch.bfloat16)
    adapters = random_adapters(torch.bfloat16)
    for slot, changes in adapters.items():
        case.step.place_adapter(slot, changes)
    slots = case.slots(MIXED)
    plain, native, expected = case.native(None), case.native(slots), case.expected(adapters, slots)
    assert torch.equal(native[slots < 0], plain[slots < 0])
    adapted = slots >= 0
    error = (native - expected)[adapted].norm() / expected[adapted].norm()
    assert error < 0.05, f"relative error {error:.3f}"
    assert (plain - expected)[adapted].norm() / expected[adapted].norm() > 0.2, "the adapters change nothing"


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_tokens_alone(isa: str, count: int) -> None:
    """Up to two tokens each member of the team prepares for itself."""
    torch.manual_seed(23)
    plan = random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False)
    step, adapters = NativeStep(plan), random_adapters(torch.float32)
    for slot, changes in adapters.items():
        step.place_adapter(slot, changes)
    batch, blocks = random_batch([30, 7][:count], [1] * count, 16)
    caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, torch.float32) for _ in plan.layers]
    ids, wanted, slots = torch.randint(0, VOCAB, (count,)), torch.arange(count), torch.tensor([1, 0][:count])
    native = step(ids, batch, copies_of(caches), wanted, slots)
    expected = reference_step(plan, ids, batch, copies_of(caches), wanted, adapters, slots)
    torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_slot_holds_nothing_of_the_adapter_before(isa: str) -> None:
    torch.manual_seed(24)
    case = Case(random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False), torch.float32)
    wide = random_adapters(torch.float32)[1]
    overflowing = [random_change(0, "q", 3, torch.float32), random_change(1, "gate", 3, torch.float32)]
    for change in overflowing:
        change.down.fill_(torch.finfo(torch.float32).max)
    narrow = [random_change(0, "q", 2, torch.float32), random_change(1, "gate", 2, torch.float32)]
    slots = case.slots([0] * 7)
    plain = case.native(None)
    for changes in (wide, overflowing):  # the second leaves infinities behind
        case.step.place_adapter(0, changes)
        case.native(slots)
    case.step.place_adapter(0, narrow)
    expected = case.expected({0: narrow}, slots)
    torch.testing.assert_close(case.native(slots), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    case.step.place_adapter(0, [])
    assert torch.equal(case.native(slots), plain)


def test_what_does_not_fit_is_refused_and_the_slot_stays(isa: str) -> None:
    torch.manual_seed(25)
    case = Case(random_plan(torch.float32, dtype=torch.float32, particular=False, parts=False), torch.float32)
    good = random_adapters(torch.float32)[0]
    case.step.place_adapter(0, good)
    slots = case.slots([0] * 7)
    before = case.native(slots)
    bad = [
        random_change(2, "q", 4, torch.float32),
        LowRankChange(0, Projection.OUTPUT, 1, torch.zeros(4, QUERY), torch.zeros(HIDDEN, 4), 1.0),
        LowRankChange(0, Projection.DOWN, 0, torch.zeros(4, INNER + 32), torch.zeros(HIDDEN, 4), 1.0),
        LowRankChange(0, Projection.DOWN, 0, torch.zeros(40, INNER), torch.zeros(HIDDEN, 4), 1.0),
        LowRankChange(0, Projection.GATE_UP, 8, torch.zeros(4, HIDDEN), torch.zeros(INNER, 4), 1.0),
    ]
    for change in bad:
        with pytest.raises(ValueError, match="change 1 of the adapter does not fit"):
            case.step.place_adapter(0, [good[0], change])
    with pytest.raises(ValueError, match="adapter slot -1"):
        case.step.place_adapter(-1, good)
    with pytest.raises(ValueError, match="3 adapter slots for"):
        case.native(slots[:3])
    assert torch.equal(case.native(slots), before)
