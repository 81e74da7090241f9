"""Reading load from the metrics pages of different runtimes."""

from __future__ import annotations

import pytest

from octavo_gateway.reports import parse_report

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
"""
OLD_VLLM = VLLM.replace(b"kv_cache_usage_perc", b"gpu_cache_usage_perc")
OCTAVO = b"octavo_requests_waiting 1\noctavo_requests_running 4\noctavo_kv_cache_utilization 5e-1\n" + VLLM
SGLANG = (
    b'sglang:num_queue_reqs{model_name="m"} 2\nsglang:num_running_reqs{model_name="m"} 3\nsglang:token_usage{} 0.25'
)
TGI = b"tgi_queue_size 2\ntgi_batch_current_size 3\n"


@pytest.mark.parametrize(
    ("page", "expected"),
    [(VLLM, (2, 3, 0.25)), (OLD_VLLM, (2, 3, 0.25)), (OCTAVO, (1, 4, 0.5)), (SGLANG, (2, 3, 0.25)), (TGI, (2, 3, 0))],
)
def test_each_runtimes_own_names_are_understood(page: bytes, expected: tuple[float, float, float]) -> None:
    report = parse_report(page, now=7.0)

    assert report is not None
    assert (report.waiting, report.running, report.kv_cache_utilization) == expected
    assert report.at == 7.0


def test_series_of_several_ranks_are_summed_and_utilizations_averaged() -> None:
    page = VLLM + VLLM.replace(b'engine="0"', b'engine="1"').replace(b"0.25", b"0.75")
    report = parse_report(page, 0.0)

    assert report is not None
    assert (report.waiting, report.running, report.kv_cache_utilization) == (4, 6, 0.5)


@pytest.mark.parametrize("page", [b"", b"up 1\n", b"vllm:num_requests_waiting{ NaN", b"\xff\xfe", b"<html></html>"])
def test_a_page_of_something_else_is_no_report(page: bytes) -> None:
    assert parse_report(page, 0.0) is None


def test_the_size_of_the_cache_is_read_from_the_labels_it_is_told_in() -> None:
    page = (
        b"vllm:num_requests_running 1\n"
        b'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="7385"} 1.0\n'
    )
    report = parse_report(page, 0.0)
    unknown = parse_report(page.replace(b"7385", b"None"), 0.0)

    assert report is not None
    assert report.kv_cache_tokens == 16 * 7_385
    assert unknown is not None
    assert unknown.kv_cache_tokens is None
