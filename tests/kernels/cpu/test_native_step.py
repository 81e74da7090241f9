"""A whole native step gives the logits that the same decoder gives op by op on the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kernels.cpu.random_weights import random_gguf
from kernels.cpu.test_native_attention import random_batch, random_cache
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.cpu.bindings import NativeError
from octavo_kernels.cpu.step import PHASES, NativeStep
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.reference import activation, attention, kv_cache, linear, norm
from octavo_kernels.step import Activation, DecoderLayerPlan, DecoderPlan, UnsupportedPlanError
from octavo_kernels.weights import Weight

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 300, 6, 2, 32


def _cos_sin(rotary_dim: int, positions: int = 600) -> torch.Tensor:
    angles = torch.outer(torch.arange(positions), 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _plan(form: GGMLType | torch.dtype, *, dtype: torch.dtype, particular: bool, parts: bool) -> DecoderPlan:
    """A random decoder.

    particular: biases, head norms, norms of what blocks give, a window, rotation of some layers only and in part, GELU,
    soft caps, sinks. parts: projections are not fused.
    """
    table = _cos_sin(16 if particular else HEAD_DIM)

    def weight(rows: int, columns: int) -> Weight:
        if isinstance(form, GGMLType):
            return random_gguf(form, rows, columns, scale=0.02)
        return (torch.randn(rows, columns) / columns**0.5).to(form)

    def layer(window: int) -> DecoderLayerPlan:
        sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        qkv = tuple(weight(size, HIDDEN) for size in sizes) if parts else (weight(sum(sizes), HIDDEN),)
        gate_up = (weight(INNER, HIDDEN), weight(INNER, HIDDEN)) if parts else (weight(2 * INNER, HIDDEN),)
        return DecoderLayerPlan(
            input_norm=torch.rand(HIDDEN) + 0.5,
            qkv=qkv,
            qkv_bias=torch.randn(sum(sizes)) if particular else None,
            q_norm=torch.rand(HEAD_DIM) + 0.5 if particular else None,
            k_norm=torch.rand(HEAD_DIM) + 0.5 if particular else None,
            output=random_gguf(GGMLType.Q8_0, HIDDEN, sizes[0], 0.002) if parts else _output(form),
            output_bias=torch.randn(HIDDEN) if particular else None,
            attention_out_norm=torch.rand(HIDDEN) + 0.5 if particular else None,
            post_attention_norm=torch.rand(HIDDEN) + 0.5,
            gate_up=gate_up,
            gate_up_bias=torch.randn(2 * INNER) if particular else None,
            down=weight(HIDDEN, INNER),
            down_bias=torch.randn(HIDDEN) if particular else None,
            mlp_out_norm=torch.rand(HIDDEN) + 0.5 if particular else None,
            cos_sin=table if not particular or window > 0 else None,
            sliding_window=window,
            soft_cap=3.0 if particular and window > 0 else 0.0,
            sinks=torch.randn(HEADS) if particular and window == 0 else None,
        )

    return DecoderPlan(
        dtype=dtype,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        vocab_size=VOCAB,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        attention_scale=HEAD_DIM**-0.5,
        activation=Activation.GELU if particular else Activation.SILU,
        max_positions=table.shape[0],
        embedding=weight(VOCAB, HIDDEN),
        embedding_scale=2.0 if particular else 1.0,
        layers=(layer(0), layer(9 if particular else 0)),
        final_norm=torch.rand(HIDDEN) + 0.5,
        lm_head=weight(VOCAB, HIDDEN),
        final_soft_cap=5.0 if particular else 0.0,
    )


def _output(form: GGMLType | torch.dtype) -> Weight:
    """192 columns: too narrow for the 256-column types, which then use Q8_0."""
    if isinstance(form, GGMLType):
        return random_gguf(form if form.block_size == 32 else GGMLType.Q8_0, HIDDEN, HEADS * HEAD_DIM, 0.02)
    return (torch.randn(HIDDEN, HEADS * HEAD_DIM) / 14).to(form)


def _product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return linear.linear(x, weight.float() if isinstance(weight, torch.Tensor) else weight, bias)


def _reference(
    plan: DecoderPlan, ids: torch.Tensor, batch: AttentionBatch, caches: list[PagedKVCache], wanted: torch.Tensor
) -> torch.Tensor:
    """The decoder in plain torch and float32."""
    x = linear.embedding(ids, plan.embedding, torch.float32) * plan.embedding_scale
    for layer, cache in zip(plan.layers, caches, strict=True):
        h = norm.rms_norm(x, layer.input_norm, plan.rms_norm_eps)
        qkv = torch.cat([_product(h, part) for part in layer.qkv], dim=-1)
        qkv = qkv if layer.qkv_bias is None else qkv + layer.qkv_bias
        q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        heads = (layer.cos_sin, layer.q_norm, layer.k_norm, plan.rms_norm_eps)
        q, k = kv_cache.rope_and_store_kv(q, k, v, batch.positions, batch.slot_mapping, cache, *heads)
        mask = (layer.sliding_window, layer.soft_cap, layer.sinks)
        out = attention.paged_attention(q, cache, batch, plan.attention_scale, *mask)
        x = x + _out_norm(_product(out.flatten(1), layer.output, layer.output_bias), layer.attention_out_norm)
        h = norm.rms_norm(x, layer.post_attention_norm, plan.rms_norm_eps)
        gate_up = torch.cat([_product(h, part) for part in layer.gate_up], dim=-1)
        gate_up = gate_up if layer.gate_up_bias is None else gate_up + layer.gate_up_bias
        gated = activation.gelu_and_mul if plan.activation is Activation.GELU else activation.silu_and_mul
        x = x + _out_norm(_product(gated(gate_up), layer.down, layer.down_bias), layer.mlp_out_norm)
    logits = _product(norm.rms_norm(x[wanted], plan.final_norm, plan.rms_norm_eps), plan.lm_head)
    return plan.final_soft_cap * torch.tanh(logits / plan.final_soft_cap) if plan.final_soft_cap else logits


def _out_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else norm.rms_norm(x, weight, 1e-5)


def _run_both(plan: DecoderPlan, kv_dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (native, reference) of a batch of three decodes and two prefills, one of them continued."""
    torch.manual_seed(seed)
    step = NativeStep(plan)
    batch, blocks = random_batch([5, 200, 33, 40, 70], [1, 1, 1, 40, 21], 16)
    caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, kv_dtype) for _ in plan.layers]
    copies = [PagedKVCache(*(None if t is None else t.clone() for t in _tensors(cache))) for cache in caches]
    ids = torch.randint(0, VOCAB, (batch.num_tokens,))
    wanted = torch.tensor([0, 1, 2, 42, 50, 63])
    native = step(ids, batch, caches, wanted)
    return native, _reference(plan, ids, batch, copies, wanted)


def _tensors(cache: PagedKVCache) -> tuple[torch.Tensor | None, ...]:
    return cache.key, cache.value, cache.key_scale, cache.value_scale


FORMS = (GGMLType.Q4_1, GGMLType.Q6_K, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("particular", "parts"), itertools.product((False, True), repeat=2))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_steps_equal_the_reference(
    isa: str, form: GGMLType | torch.dtype, particular: bool, parts: bool
) -> None:
    torch.manual_seed(11)
    plan = _plan(form, dtype=torch.float32, particular=particular, parts=parts)
    native, expected = _run_both(plan, torch.float32, seed=1)
    torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_sixteen_bit_steps_stay_close(isa: str, form: GGMLType | torch.dtype, kv_dtype: torch.dtype) -> None:
    torch.manual_seed(12)
    plan = _plan(form, dtype=torch.bfloat16, particular=False, parts=False)
    native, expected = _run_both(plan, kv_dtype, seed=2)
    error = (native - expected).norm() / expected.norm()
    assert error < 0.05, f"relative error {error:.3f}"


def test_a_step_continues_from_the_cache_it_wrote(isa: str) -> None:
    """Token by token and all at once give the same last logits."""
    torch.manual_seed(13)
    plan = _plan(torch.float32, dtype=torch.float32, particular=False, parts=False)
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
    step = NativeStep(_plan(torch.float32, dtype=torch.float32, particular=False, parts=False))
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
    step = NativeStep(_plan(torch.float32, dtype=torch.float32, particular=False, parts=False))
    batch, blocks = random_batch([3], [3], 16)
    caches = [random_cache(blocks, KV_HEADS, 16, HEAD_DIM, torch.float32) for _ in range(2)]
    step.profile(True)
    step(torch.tensor([0, 1, 2]), batch, caches, torch.tensor([2]))
    spent = step.profile(False)
    assert tuple(spent) == PHASES
    assert spent["gate_up"] > 0


def test_what_the_step_cannot_run_is_said(isa: str) -> None:
    torch.manual_seed(16)
    plan = _plan(torch.float32, dtype=torch.float32, particular=False, parts=False)
    with pytest.raises(UnsupportedPlanError, match="float16"):
        NativeStep(replace(plan, lm_head=torch.randn(VOCAB, HIDDEN).half()))
    with pytest.raises(UnsupportedPlanError, match="head_dim 24"):
        NativeStep(replace(plan, head_dim=24))
    with pytest.raises(UnsupportedPlanError, match="ends before position 601"):
        NativeStep(replace(plan, max_positions=601))
