from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_operator.api.serving_runtime import MetricSource
from octavo_operator.autoscale.metrics import Histogram, parse_page, read_histogram, read_signal, replica_sample
from octavo_operator.presets import preset

PAGE = """\
# HELP octavo_requests_waiting Sequences waiting.
# TYPE octavo_requests_waiting gauge
octavo_requests_waiting{model_name="a \\"b\\" {c}"} 3.0
octavo_requests_running{model_name="a"} 2
octavo_kv_cache_utilization{model_name="a"} 0.25
octavo_queued_kv_tokens{model_name="a"} 1.2e+03 1700000000
octavo_time_to_first_token_seconds_bucket{le="0.1",model_name="a"} 5
octavo_time_to_first_token_seconds_bucket{le="1.0",model_name="a"} 9
octavo_time_to_first_token_seconds_bucket{le="+Inf",model_name="a"} 10
octavo_time_to_first_token_seconds_count{model_name="a"} 10
octavo_time_to_first_token_seconds_sum{model_name="a"} 4
nonsense line here too many
other NaN
"""


def test_octavos_own_page_gives_every_signal() -> None:
    sample = replica_sample("r", parse_page(PAGE, 5.0), preset("octavo").spec.metrics)
    assert (sample.waiting, sample.running, sample.kv_utilization) == (3.0, 2.0, 0.25)
    assert sample.queued_kv_tokens == 1200.0
    assert sample.sampled_at == 5.0


def test_vllm_names_are_understood_too() -> None:
    text = (
        'vllm:num_requests_waiting{engine="0"} 1\nvllm:num_requests_waiting{engine="1"} 2\n'
        'vllm:num_requests_running{engine="0"} 7\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1\n'
    )
    sample = replica_sample("r", parse_page(text, 0.0), preset("octavo").spec.metrics)
    assert (sample.waiting, sample.running, sample.kv_utilization) == (3.0, 7.0, 0.5)
    assert sample.kv_capacity_tokens == 16_000.0


def test_labels_with_quotes_and_braces_are_read() -> None:
    (sample,) = parse_page(PAGE, 0.0).find("octavo_requests_waiting")
    assert sample.labels == {"model_name": 'a "b" {c}'}


def test_a_signal_that_is_absent_is_none_and_nan_is_absent() -> None:
    page = parse_page(PAGE, 0.0)
    assert read_signal([MetricSource(gauge="missing")], page) is None
    assert read_signal([MetricSource(gauge="other")], page) is None


def test_the_first_source_present_counts() -> None:
    sources = [MetricSource(gauge="missing"), MetricSource(gauge="octavo_requests_running")]
    assert read_signal(sources, parse_page(PAGE, 0.0)) == 2.0


def test_a_counter_of_seconds_gives_the_mean_number_by_littles_law() -> None:
    source = [MetricSource(rate="queue_us", scale="1e-6")]
    before, after = parse_page("queue_us 1000000\n", 10.0), parse_page("queue_us 31000000\n", 20.0)
    assert read_signal(source, after, before) == pytest.approx(3.0)
    assert read_signal(source, after) is None
    assert read_signal(source, parse_page("queue_us 5\n", 30.0), after) is None, "the engine restarted"


def test_ratios_and_labels() -> None:
    page = parse_page('used 30\ntotal 120\nm{kind="waiting"} 4\nm{kind="running"} 9\n', 0.0)
    assert read_signal([MetricSource(ratio=["used", "total"])], page) == 0.25
    assert read_signal([MetricSource(gauge="m", labels={"kind": "waiting"})], page) == 4.0


def test_histograms_give_quantiles_and_windows() -> None:
    histogram = read_histogram([MetricSource(histogram="octavo_time_to_first_token_seconds")], parse_page(PAGE, 0.0))
    assert histogram is not None
    assert histogram.quantile(0.5) == pytest.approx(0.1)
    assert histogram.quantile(0.7) == pytest.approx(0.55)
    assert histogram.quantile(0.99) == 1.0
    earlier = Histogram({0.1: 4, 1.0: 5, math.inf: 5}, 5, 1.0)
    window = histogram.since(earlier)
    assert (window.count, window.mean) == (5, pytest.approx(0.6))


def test_a_utilization_beyond_its_range_is_clamped() -> None:
    sample = replica_sample("r", parse_page("octavo_kv_cache_utilization 1.7\n", 0.0), preset("octavo").spec.metrics)
    assert sample.kv_utilization == 1.0


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_no_text_breaks_the_parser(text: str) -> None:
    parse_page(text, 0.0)


def test_of_a_gateways_long_page_only_what_is_asked_for_is_read_and_found_by_model() -> None:
    lines = [f'octavo_gateway_bucket{{model="m{i}"}} 1' for i in range(30_000)]
    lines += [f'octavo_gateway_held{{model="m{i}",namespace="n"}} {i}' for i in range(1_500)]
    page = parse_page("\n".join(lines), 1.0, ("octavo_gateway_held",))
    assert list(page.samples) == ["octavo_gateway_held"]
    assert [s.value for s in page.of_model("octavo_gateway_held", "m1499")] == [1_499]
    assert list(page.of_model("octavo_gateway_held", "nobody")) == []
    assert list(page.of_model("octavo_gateway_bucket", "m1")) == []
