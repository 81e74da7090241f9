"""The share of the device's limit that steps reach."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import transformers

from fake_runner import FakeRunner
from models.tiny_checkpoints import SIZES, load, write_checkpoint
from octavo_engine.roofline import DeviceLimits, Roofline, measure_limits
from octavo_engine.scheduler.step_time import StepLoad

MODEL = msgspec.structs.replace(
    FakeRunner().info, weight_bytes=1_000_000, num_parameters=500_000, kv_bytes_per_token=1_000
)
LIMITS = DeviceLimits(bytes_per_s=1e9, flops_per_s=1e9)


def test_a_small_batch_is_bound_by_bytes_and_a_large_one_by_arithmetic() -> None:
    roofline = Roofline(MODEL, LIMITS)
    assert roofline.ideal_seconds(StepLoad(1, decode_context=500), 1) == pytest.approx(1.5e-3)
    assert roofline.ideal_seconds(StepLoad(100), 100) == pytest.approx(0.1)


def test_decode_and_prefill_are_told_apart() -> None:
    roofline = Roofline(MODEL, LIMITS)
    roofline.observe(StepLoad(1), 1, 2e-3)
    roofline.observe(StepLoad(100, prefill_pairs=5_000), 1, 0.4)
    assert (roofline.decode, roofline.prefill) == (pytest.approx(0.5), pytest.approx(0.25))
    for _ in range(200):
        roofline.observe(StepLoad(1), 1, 4e-3)
    assert roofline.decode == pytest.approx(0.25, rel=0.01)


def test_the_head_works_only_for_wanted_positions() -> None:
    roofline = Roofline(msgspec.structs.replace(MODEL, head_parameters=100_000), LIMITS)
    assert roofline.ideal_seconds(StepLoad(100, prefill_pairs=5_000), 1) == pytest.approx(0.0802)
    assert roofline.ideal_seconds(StepLoad(100, prefill_pairs=5_000), 100) == pytest.approx(0.1)


def test_attention_counts_for_long_prompts() -> None:
    roofline = Roofline(msgspec.structs.replace(MODEL, attention_operations=1_000), LIMITS)
    assert roofline.ideal_seconds(StepLoad(100, prefill_pairs=50_000), 100) == pytest.approx(0.15)


def test_a_token_passes_and_reads_a_few_experts_and_a_batch_reads_most() -> None:
    mixture = msgspec.structs.replace(MODEL, expert_parameters=400_000, expert_share=0.25)
    roofline = Roofline(mixture, DeviceLimits(bytes_per_s=1e9, flops_per_s=1e12))
    assert roofline.ideal_seconds(StepLoad(1), 1) == pytest.approx(0.4e-3)
    assert roofline.ideal_seconds(StepLoad(32), 32) == pytest.approx(1e-3, rel=1e-3)
    busy = Roofline(mixture, DeviceLimits(bytes_per_s=1e12, flops_per_s=1e9))
    assert busy.ideal_seconds(StepLoad(10), 10) == pytest.approx(2 * 200_000 * 10 / 1e9)


def test_the_costs_of_a_real_architecture_add_up(tmp_path: Path) -> None:
    """Every parameter is of the head, of experts, or passed by every token; counted against transformers' own."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = write_checkpoint(tmp_path, transformers.MixtralForCausalLM, config)
    info = load(tmp_path).info
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert info.head_parameters == model.lm_head.weight.numel()
    assert info.expert_parameters == experts
    assert info.expert_share == 0.5
    assert info.num_parameters == sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()


def test_the_device_is_measured_in_plausible_bounds() -> None:
    limits = measure_limits(MODEL)
    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e16
