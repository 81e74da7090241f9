"""The engine's sampler draws with the kernel where there is one."""

from __future__ import annotations

import pytest
import torch

from octavo_engine.sampler.sampler import Sampler
from octavo_engine.sampler.state import SamplerState
from octavo_engine.sampling_params import SamplingParams
from octavo_kernels import registry
from octavo_kernels.reference import sampling as reference

pytestmark = pytest.mark.usefixtures("on_triton")

SETTINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=1.0),
]
SEEDS = [0, 2**64 - 1, 2**63, 7]


def states(settings=SETTINGS):
    return [SamplerState(p, seed, [1, 2, 3, 4], 2) for p, seed in zip(settings, SEEDS, strict=False)]


def test_tokens_are_those_the_op_defines(device):
    logits = 2 * torch.randn(4, 300, device=device)
    wanted = reference.sample(
        logits,
        torch.tensor([p.temperature for p in SETTINGS], device=device),
        torch.tensor([p.top_k for p in SETTINGS], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in SETTINGS], device=device),
        torch.tensor([p.min_p for p in SETTINGS], device=device),
        torch.tensor([0, -1, -(2**63), 7], device=device),
        torch.full((4,), 2, device=device),
    )
    assert Sampler().sample(logits, states()).token_ids == wanted.tolist()
    assert any(choice.op == "sample" and choice.backend == "triton" for choice in registry.choices())


def test_draws_do_not_depend_on_the_batch(device):
    logits = 2 * torch.randn(4, 300, device=device)
    together = Sampler().sample(logits.clone(), states()).token_ids
    for row in range(4):
        alone = Sampler().sample(logits[row : row + 1].clone(), states()[row : row + 1]).token_ids
        assert alone == together[row : row + 1]


def test_settings_without_a_kernel_still_draw(device):
    typical = [SamplingParams(temperature=1.0, typical_p=0.5)]
    tokens = Sampler().sample(torch.randn(1, 300, device=device), states(typical)).token_ids
    assert 0 <= tokens[0] < 300
