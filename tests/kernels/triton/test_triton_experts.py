"""Mixture of experts, adapters and latent attention, against their references."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.expert_weights import ExpertWeight, join_rows
from octavo_kernels.quantized_weights import quantize_int4, quantize_int8
from octavo_kernels.reference import lora, mla, moe, quantize

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned")


@pytest.mark.parametrize(
    ("experts", "top_k", "options"),
    [
        (8, 2, {}),
        (60, 4, {"renormalize": False}),
        (128, 8, {"scale": 2.5}),
        (5, 5, {}),
        (64, 6, {"sigmoid": True, "correction_bias": True, "num_groups": 8, "top_groups": 3, "scale": 2.5}),
    ],
    ids=str,
)
def test_the_router_chooses_the_same_experts(device, experts, top_k, options):
    logits = torch.randn(7, experts, device=device)
    if "correction_bias" in options:
        options = {**options, "correction_bias": 0.1 * torch.randn(experts, device=device)}
    weights, ids = ops.route_experts(logits, top_k, **options)
    wanted_weights, wanted_ids = moe.route_experts(logits, top_k, **options)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)


def test_sorting_groups_every_assignment_once(device):
    from octavo_kernels.triton.grouped_gemm import sort_by_group

    ids = torch.randint(-1, 6, (40, 3), dtype=torch.int32, device=device)
    ids[ids == 2] = 5  # a group without members
    rows = sort_by_group(ids, 6, 16)
    seen = []
    for block, group in enumerate(rows.block_group.tolist()):
        members = rows.sorted_ids[block * 16 : block * 16 + 16]
        if group < 0:
            continue
        real = members[members < 120].long()
        assert (ids.flatten()[real] == group).all()
        assert (real.diff() > 0).all()
        seen += real.tolist()
    assert sorted(seen) == (ids.flatten() >= 0).nonzero().flatten().tolist()


def expert_weight(device, experts, rows, columns, kind):
    dense = torch.randn(experts, rows, columns, device=device) / columns**0.5
    bias = torch.randn(experts, rows, device=device) if kind != "plain" else None
    if kind in ("plain", "biased"):
        return ExpertWeight(dense, None, bias)
    codes, scale = quantize.quantize_rows(dense.flatten(0, 1), torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return ExpertWeight(codes.view(dense.shape), scale.view(experts, rows), bias)


@pytest.mark.parametrize("kind", ["plain", "biased", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_match(device, kind, tokens):
    gate_up, down = expert_weight(device, 6, 48, 40, kind), expert_weight(device, 6, 40, 24, kind)
    x = torch.randn(tokens, 40, device=device)
    weights, ids = moe.route_experts(torch.randn(tokens, 6, device=device), 2)
    actual = ops.moe_mlp(x, gate_up, down, weights, ids)
    torch.testing.assert_close(actual, moe.moe_mlp(x, gate_up, down, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_of_packed_integers_match(device, bits, biased):
    experts, dim, inner = 3, 64, 32

    def weight(rows, columns):
        parts = [torch.randn(rows, columns, device=device) / columns**0.5 for _ in range(experts)]
        quantized = [quantize_int4(part, 32) if bits == 4 else quantize_int8(part) for part in parts]
        packed = join_rows([ops.pack_weight(part) for part in quantized])
        bias = torch.randn(experts, rows, device=device) if biased else None
        return ExpertWeight(packed, None, bias, experts)

    gate_up, down = weight(2 * inner, dim), weight(dim, inner)
    x = torch.randn(21, dim, device=device)
    weights, ids = moe.route_experts(torch.randn(21, experts, device=device), 2)
    actual = ops.moe_mlp(x, gate_up, down, weights, ids)
    torch.testing.assert_close(actual, moe.moe_mlp(x, gate_up, down, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu_and_mul", "clamped_swiglu_and_mul"])
def test_experts_with_other_activations_match(device, activation):
    gate_up, down = expert_weight(device, 3, 32, 16, "plain"), expert_weight(device, 3, 16, 16, "plain")
    x = torch.randn(5, 16, device=device)
    weights, ids = moe.route_experts(torch.randn(5, 3, device=device), 1)
    actual = ops.moe_mlp(x, gate_up, down, weights, ids, activation)
    torch.testing.assert_close(actual, moe.moe_mlp(x, gate_up, down, weights, ids, activation), rtol=1e-4, atol=1e-4)


def test_experts_of_other_ranks_are_left_out(device):
    gate_up, down = expert_weight(device, 2, 32, 16, "plain"), expert_weight(device, 2, 16, 16, "plain")
    x, weights = torch.randn(3, 16, device=device), torch.ones(3, 2, device=device)
    ids = torch.tensor([[0, -1], [-1, -1], [1, 7]], dtype=torch.int32, device=device)
    actual = ops.moe_mlp(x, gate_up, down, weights, ids)
    torch.testing.assert_close(actual, moe.moe_mlp(x, gate_up, down, weights, ids), rtol=1e-4, atol=1e-4)
    assert (actual[1] == 0).all()


@pytest.mark.parametrize("in_features", [40, 2048])
def test_adapters_are_added_to_their_own_rows(device, in_features):
    fused = torch.randn(20, 100, device=device)
    out, x = fused[:, 30:80], torch.randn(20, in_features, device=device)
    lora_a, lora_b = torch.randn(3, 8, in_features, device=device), torch.randn(3, 50, 8, device=device)
    adapters = torch.randint(-1, 3, (20,), dtype=torch.int32, device=device)
    scales = torch.tensor([0.5, 1.0, 2.0], device=device) / in_features
    before = fused.clone()
    wanted = lora.add_lora(before.clone()[:, 30:80], x, lora_a, lora_b, adapters, scales)
    ops.add_lora(out, x, lora_a, lora_b, adapters, scales)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(fused[:, :30], before[:, :30])
    assert torch.equal(fused[adapters < 0], before[adapters < 0])


@pytest.mark.parametrize("sequences", [[(1, 1), (1, 40), (1, 300)], [(1, 9), (6, 30), (3, 3)]], ids=str)
@pytest.mark.parametrize("heads", [4, 20])
def test_latent_attention_matches(make_paged, sequences, heads):
    _, cache, batch = make_paged(sequences, 1, 1, 80)
    latent = cache.key[:, 0].contiguous()
    query = torch.randn(batch.num_tokens, heads, 80, dtype=torch.float16, device=latent.device)
    actual = ops.mla_attention(query, latent, batch, 0.1, 64)
    wanted = mla.mla_attention(query, latent, batch, 0.1, 64)
    torch.testing.assert_close(actual, wanted, rtol=4e-3, atol=4e-3)
