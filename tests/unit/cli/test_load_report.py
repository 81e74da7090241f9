"""The summary of a load test."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_cli.load_report import Sample, percentile, summarize


def test_percentiles_interpolate_between_closest_ranks() -> None:
    values = [4.0, 1.0, 3.0, 2.0]

    assert percentile(values, 0) == 1.0
    assert percentile(values, 50) == 2.5
    assert percentile(values, 100) == 4.0
    assert percentile([], 99) == 0.0


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_a_percentile_lies_between_the_extremes(values: list[float], rank: float) -> None:
    assert min(values) <= percentile(values, rank) <= max(values) * (1 + 1e-9)


def test_tokens_per_second_count_completed_requests_only() -> None:
    samples = [
        Sample(ok=True, input_tokens=10, output_tokens=5, ttft_s=0.1, e2e_s=0.5, itl_s=(0.1, 0.1, 0.1, 0.1)),
        Sample(ok=True, input_tokens=10, output_tokens=1, ttft_s=0.3, e2e_s=0.3),
        Sample(ok=False, error="429: full", status=429),
        Sample(ok=False, error="reset"),
    ]

    report = summarize(samples, 2.0)

    assert (report["completed"], report["failed"], report["rejected"]) == (2, 2, 1)
    assert report["output_throughput"] == 3.0
    assert report["total_token_throughput"] == 13.0
    assert report["mean_tpot_ms"] == pytest.approx(100.0)
    assert report["median_ttft_ms"] == pytest.approx(200.0)
    assert report["p99_itl_ms"] == pytest.approx(100.0)


def test_the_peaks_are_those_of_what_ran_together() -> None:
    samples = [
        Sample(ok=True, started_s=0.0, output_tokens=4, ttft_s=0.5, e2e_s=2.0, itl_s=(0.2, 0.8)),
        Sample(ok=True, started_s=0.4, output_tokens=1, ttft_s=0.3, e2e_s=0.3),
        Sample(ok=True, started_s=2.0, output_tokens=6, ttft_s=0.1, e2e_s=0.5, itl_s=(0.1, 0.1)),
        Sample(ok=False, started_s=0.0, e2e_s=9.0),
    ]

    report = summarize(samples, 3.0)

    assert report["max_concurrent_requests"] == 2
    assert report["max_output_tokens_per_s"] == pytest.approx(6.0)
    assert summarize([], 1.0)["max_concurrent_requests"] == summarize([], 1.0)["max_output_tokens_per_s"] == 0


def test_goodput_needs_every_limit_kept_and_failures_are_not_good() -> None:
    samples = [
        Sample(ok=True, output_tokens=2, ttft_s=0.1, e2e_s=0.2),
        Sample(ok=True, output_tokens=2, ttft_s=0.1, e2e_s=0.9),
        Sample(ok=True, output_tokens=2, ttft_s=0.4, e2e_s=0.5),
        Sample(ok=False),
    ]

    report = summarize(samples, 1.0, goodput={"ttft": 200, "tpot": 150})

    assert report["request_goodput"] == 1.0
    assert report["good_request_fraction"] == 0.25
