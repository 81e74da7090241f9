"""A mixture as one op gives what its experts give one by one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from octavo_engine.layers.fused_moe import FusedMoE, fuse
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.layers.moe import MoE, SharedExpert
from octavo_engine.layers.routing import Routing
from octavo_kernels import ops
from octavo_kernels.quantized_weights import quantize_fp8
from octavo_kernels.registry import use_backends

EXPERTS, HIDDEN, INNER = 5, 16, 24


@pytest.fixture(autouse=True)
def plain_torch():
    torch.manual_seed(0)
    with use_backends("reference"):
        yield


def make_moe(store=lambda weight: weight, activation=ops.silu_and_mul, biased=False, shared=False):
    def linear(rows, columns):
        return Linear((store(torch.randn(rows, columns) / columns**0.5),), torch.randn(rows) if biased else None)

    experts = tuple(GatedMLP(linear(2 * INNER, HIDDEN), linear(HIDDEN, INNER), activation) for _ in range(EXPERTS))
    router = Linear((torch.randn(EXPERTS, HIDDEN),))
    extra = SharedExpert(experts[0], Linear((torch.randn(1, HIDDEN),))) if shared else None
    return MoE(router, experts, Routing(2, True), extra)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": True},
        {"store": quantize_fp8},
        {"biased": True, "activation": partial(ops.clamped_swiglu_and_mul, alpha=1.5, limit=3.0)},
        {"activation": ops.gelu_and_mul},
    ],
    ids=["dense", "shared expert", "float8", "gpt-oss", "gelu"],
)
def test_the_fused_layer_gives_the_same(options):
    moe = make_moe(**options)
    fused = fuse(moe)
    assert isinstance(fused, FusedMoE)
    x = torch.randn(9, HIDDEN)
    torch.testing.assert_close(fused(x), moe(x), rtol=1e-4, atol=1e-5)


def test_experts_that_cannot_be_stacked_stay_apart():
    for moe in (make_moe(partial(quantize_fp8, blockwise=True)), make_moe(activation=torch.relu)):
        assert fuse(moe) is moe
