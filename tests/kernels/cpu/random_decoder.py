"""Random decoders as plans, and the same decoder in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from kernels.cpu.random_weights import random_gguf
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.reference import activation, attention, kv_cache, linear, norm
from octavo_kernels.step import Activation, DecoderLayerPlan, DecoderPlan, LowRankChange, Projection
from octavo_kernels.weights import Weight

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 300, 6, 2, 32


def _cos_sin(rotary_dim: int, positions: int = 600) -> torch.Tensor:
    angles = torch.outer(torch.arange(positions), 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def random_plan(form: GGMLType | torch.dtype, *, dtype: torch.dtype, particular: bool, parts: bool) -> DecoderPlan:
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


def post_normed(plan: DecoderPlan) -> DecoderPlan:
    """The same weights with OLMo 2's norms: after blocks instead of before, over all heads at once."""

    def norms() -> dict[str, torch.Tensor | None]:
        sizes = {"q_norm": HEADS * HEAD_DIM, "k_norm": KV_HEADS * HEAD_DIM}
        sizes |= {"attention_out_norm": HIDDEN, "mlp_out_norm": HIDDEN}
        weights: dict[str, torch.Tensor | None] = {name: torch.rand(size) + 0.5 for name, size in sizes.items()}
        return weights | {"input_norm": None, "post_attention_norm": None}

    return replace(plan, layers=tuple(replace(layer, **norms()) for layer in plan.layers))


def _output(form: GGMLType | torch.dtype) -> Weight:
    """192 columns: too narrow for the 256-column types, which then use Q8_0."""
    if isinstance(form, GGMLType):
        return random_gguf(form if form.block_size == 32 else GGMLType.Q8_0, HIDDEN, HEADS * HEAD_DIM, 0.02)
    return (torch.randn(HIDDEN, HEADS * HEAD_DIM) / 14).to(form)


def _product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return linear.linear(x, weight.float() if isinstance(weight, torch.Tensor) else weight, bias)


def reference_step(
    plan: DecoderPlan,
    ids: torch.Tensor,
    batch: AttentionBatch,
    caches: list[PagedKVCache],
    wanted: torch.Tensor,
    adapters: Mapping[int, Sequence[LowRankChange]] | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """The decoder in plain torch and float32. adapters: by slot; slots: [T]."""

    def adapted(index: int, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for slot, changes in (adapters or {}).items():
            assert slots is not None
            rows = slots == slot
            for change in changes:
                if (change.layer, change.projection) == (index, projection):
                    added = change.scale * (x[rows] @ change.down.float().t()) @ change.up.float().t()
                    out[rows, change.first : change.first + added.shape[1]] += added
        return out

    x = linear.embedding(ids, plan.embedding, torch.float32) * plan.embedding_scale
    for index, (layer, cache) in enumerate(zip(plan.layers, caches, strict=True)):
        h = _normed(x, layer.input_norm)
        qkv = torch.cat([_product(h, part) for part in layer.qkv], dim=-1)
        qkv = qkv if layer.qkv_bias is None else qkv + layer.qkv_bias
        qkv = adapted(index, Projection.QKV, h, qkv)
        q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        head_norms = (layer.q_norm, layer.k_norm)
        if layer.q_norm is not None and layer.q_norm.shape[0] != HEAD_DIM:
            q, k = (
                _normed(part.flatten(1), weight).unflatten(1, (-1, HEAD_DIM))
                for part, weight in zip((q, k), head_norms, strict=True)
            )
            head_norms = (None, None)
        heads = (layer.cos_sin, *head_norms, plan.rms_norm_eps)
        q, k = kv_cache.rope_and_store_kv(q, k, v, batch.positions, batch.slot_mapping, cache, *heads)
        mask = (layer.sliding_window, layer.soft_cap, layer.sinks)
        out = attention.paged_attention(q, cache, batch, plan.attention_scale, *mask)
        out = out.flatten(1)
        out = adapted(index, Projection.OUTPUT, out, _product(out, layer.output, layer.output_bias))
        x = x + _normed(out, layer.attention_out_norm)
        h = _normed(x, layer.post_attention_norm)
        gate_up = torch.cat([_product(h, part) for part in layer.gate_up], dim=-1)
        gate_up = gate_up if layer.gate_up_bias is None else gate_up + layer.gate_up_bias
        gate_up = adapted(index, Projection.GATE_UP, h, gate_up)
        gated = activation.gelu_and_mul if plan.activation is Activation.GELU else activation.silu_and_mul
        inner = gated(gate_up)
        out = adapted(index, Projection.DOWN, inner, _product(inner, layer.down, layer.down_bias))
        x = x + _normed(out, layer.mlp_out_norm)
    logits = _product(norm.rms_norm(x[wanted], plan.final_norm, plan.rms_norm_eps), plan.lm_head)
    return plan.final_soft_cap * torch.tanh(logits / plan.final_soft_cap) if plan.final_soft_cap else logits


def _normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else norm.rms_norm(x, weight, 1e-5)
