"""Tuned configurations: the file, the search with a clock of its own, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from octavo_cli import tune
from octavo_cli.main import build_app
from octavo_kernels import ops
from octavo_kernels.triton import autotune, tuning
from octavo_kernels.triton.packed_weight import pack_int
from octavo_kernels.triton.tuning import LaunchConfig, TunedConfigError
from octavo_kernels.triton.workloads import Call, Workload

CPU = torch.device("cpu")
TABLE = {"packed_gemm_m16": {"k1": LaunchConfig(block_n=8), "a": LaunchConfig(num_warps=2)}}


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.ENV_CONFIG_DIR, str(tmp_path))
    tuning.device_table.cache_clear()
    yield
    tuning.device_table.cache_clear()


def test_tables_survive_the_file(tmp_path):
    path = tmp_path / tuning.file_name("NVIDIA H200")
    tuning.write_table(path, "NVIDIA H200", {"torch": "1"}, TABLE)
    assert path.name == "nvidia_h200.json"
    assert tuning.read_table(path) == TABLE
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kernels": {"a": {"b": {"block_q": 1}}}}', '{"kernels": {"a": {"b": {"block_m": -1}}}}']
)
def test_files_that_are_not_tables_are_refused_by_name(tmp_path, text):
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(TunedConfigError, match=r"cpu\.json"):
        tuning.read_table(path)


def test_lookups_prefer_the_file_and_fall_back_to_the_default(tmp_path):
    tuning.write_table(tmp_path / "cpu.json", "cpu", {}, TABLE)
    default = LaunchConfig(block_m=77)
    assert tuning.launch_config("packed_gemm_m16", "k1", CPU, default) == LaunchConfig(block_n=8)
    assert tuning.launch_config("packed_gemm_m16", "unknown", CPU, default) == default


def test_trials_end_with_their_block():
    default, tried = LaunchConfig(), LaunchConfig(block_n=256)
    with tuning.trial("a", "b", tried):
        assert tuning.launch_config("a", "b", CPU, default) == tried
        assert tuning.launch_config("a", "other", CPU, default) == default
    assert tuning.launch_config("a", "b", CPU, default) == default


def test_candidates_start_with_the_default_and_are_distinct():
    default = LaunchConfig(block_m=16)
    for kernel in ("mla_decode", "packed_gemm_m64", "paged_attention_decode", "unknown"):
        found = autotune.candidates(kernel, default)
        assert found[0] == default
        assert len(found) == len(set(found))


@pytest.mark.usefixtures("on_triton")
def test_the_search_keeps_the_fastest_candidate_and_reports_it(device):
    from octavo_kernels.quantized_weights import quantize_int4

    weight = pack_int(quantize_int4(torch.randn(8, 64, device=device), 32))
    seen: list[LaunchConfig] = []
    x = torch.randn(1, 64, device=device)

    def run():
        seen.append(tuning.launch_config("packed_gemm_m16", KEY, device, LaunchConfig()))
        return ops.linear(x, weight)

    with tuning.recording() as asked:
        ops.linear(x, weight)
    ((kernel, KEY),) = asked
    assert kernel == "packed_gemm_m16"

    def measure(call):
        if len(seen) < 2:  # run the kernel for the first candidates, then only look
            call()
        else:
            seen.append(tuning.launch_config(kernel, KEY, device, LaunchConfig()))
        if seen[-1] != replace(seen[-1], block_n=128, num_stages=6, block_k=32):
            return 1.0
        return 0.25 if seen[-1].splits == 4 else 0.5

    findings = []
    table = autotune.tune([Workload("tiny", lambda device: Call(run, 1))], device, measure, findings.append)
    best = table["packed_gemm_m16"][KEY]
    assert (best.block_n, best.num_stages, best.block_k, best.splits) == (128, 6, 32, 4)
    assert findings[0].improved
    assert findings[0].tried == len(autotune.candidates("packed_gemm_m16", asked[kernel, KEY])) + 8


def test_kernels_furthest_from_the_limits_are_tuned_first():
    names = ["rms_norm 8192", "prefill 1 x 8k", "int4-g128 1 rows", "decode 64 x 4k, 3k shared", "sample 1 row"]
    ordered = sorted((Workload(name, lambda device: Call(list, 1)) for name in names), key=tune._urgency)
    assert [workload.name for workload in ordered] == [names[2], names[3], names[1], names[0], names[4]]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("config", [LaunchConfig(block_n=64, num_warps=2), LaunchConfig(block_n=1024, num_warps=8)])
def test_a_tuned_block_changes_no_quantized_activation(device, config):
    x = torch.randn(5, 600, device=device)
    with tuning.recording() as asked:
        codes, scale = ops.silu_and_mul_quantize(x, torch.int8)
    ((kernel, key),) = asked
    with tuning.trial(kernel, key, config):
        again = ops.silu_and_mul_quantize(x, torch.int8)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(build_app("tune"), ["tune"])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
