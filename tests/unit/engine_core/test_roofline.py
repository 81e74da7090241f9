"""The share of the device's limit that steps reach."""

from __future__ import annotations

import msgspec
import pytest

from fake_runner import FakeRunner
from octavo_engine.roofline import DeviceLimits, Roofline, measure_limits
from octavo_engine.scheduler.step_time import StepLoad

MODEL = msgspec.structs.replace(
    FakeRunner().info, weight_bytes=1_000_000, num_parameters=500_000, kv_bytes_per_token=1_000
)
LIMITS = DeviceLimits(bytes_per_s=1e9, flops_per_s=1e9)


def test_a_small_batch_is_bound_by_bytes_and_a_large_one_by_arithmetic() -> None:
    roofline = Roofline(MODEL, LIMITS)
    assert roofline.ideal_seconds(StepLoad(1, decode_context=500)) == pytest.approx(1.5e-3)
    assert roofline.ideal_seconds(StepLoad(100)) == pytest.approx(0.1)


def test_decode_and_prefill_are_told_apart() -> None:
    roofline = Roofline(MODEL, LIMITS)
    roofline.observe(StepLoad(1), 2e-3)
    roofline.observe(StepLoad(100, prefill_pairs=5_000), 0.4)
    assert (roofline.decode, roofline.prefill) == (pytest.approx(0.5), pytest.approx(0.25))
    for _ in range(200):
        roofline.observe(StepLoad(1), 4e-3)
    assert roofline.decode == pytest.approx(0.25, rel=0.01)


def test_the_device_is_measured_in_plausible_bounds() -> None:
    limits = measure_limits(MODEL)
    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e16
