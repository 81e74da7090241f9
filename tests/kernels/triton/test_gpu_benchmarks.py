"""The GPU benchmarks refuse clearly without a GPU, and their comparison with references catches what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from fakes.eventually import eventually

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["gpu_kernels", "gpu_engine", "gpu_run"])
def test_without_a_gpu_nothing_is_measured(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as ended:
        load(script).main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "no CUDA device" in shown.err
    assert shown.out == ""


def calls(ours, reference):
    """A call that gives `ours` on the chosen backend and `reference` on the reference."""
    from octavo_kernels.registry import backend_order
    from octavo_kernels.triton.workloads import Call

    return Call(lambda: reference if backend_order("cpu") == ("reference",) else ours, bytes=1)


@pytest.mark.usefixtures("on_triton")
def test_results_are_compared_with_the_reference():
    compare = load("gpu_kernels")._error
    x = torch.randn(50)
    assert compare(calls((x, None, x), (x, None, x))) == 0
    assert compare(calls(x * 1.001, x)) < 0.01
    assert compare(calls(-x, x)) > 1
    assert compare(calls(torch.full((50,), float("nan")), x)) == float("inf")


def test_stages_of_a_run_name_scripts_that_exist(tmp_path):
    found = load("gpu_run").stages(tmp_path, "card", "model.gguf")
    for stage in found:
        assert 0 < stage.least_s <= stage.limit_s
        for word in stage.command:
            if word.endswith(".py"):
                assert Path(word).is_file()
    assert len({stage.name for stage in found}) == len(found)


def test_a_stage_gets_what_time_is_left_and_nothing_of_it_lives_on(tmp_path):
    run = load("gpu_run")
    sleeper = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    outcome = run.run(run.Stage("slow", [sys.executable, "-c", sleeper], 100), tmp_path, left_s=3.0)
    assert (outcome.name, outcome.ended) == ("slow", "timed out")
    assert outcome.seconds < 50
    child = int((tmp_path / "slow.log").read_text())
    asyncio.run(eventually(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie", 10))
    failed = run.run(run.Stage("bad", [sys.executable, "-c", "raise SystemExit('no | luck')"], 60), tmp_path, 60)
    assert (failed.ended, failed.note) == ("failed", "no   luck")


def test_stages_are_left_out_with_the_reason():
    run = load("gpu_run")

    def why(stage, left_s=100, **given):
        known = {"skip": [], "only": [], "device": "cuda", "model": "", "model_parts": None}
        return run.why_not(stage, argparse.Namespace(**{**known, **given}), left_s)

    assert why(run.Stage("a", [], 50)) == ""
    assert why(run.Stage("a", [], 50, least_s=40), left_s=30) == "30 s left, it needs 40"
    assert why(run.Stage("a", [], 50), skip=["a"]) == why(run.Stage("a", [], 50), only=["b"]) == "left out"
    assert why(run.Stage("a", [], 50), device="cpu") == "needs a GPU"
    assert why(run.Stage("a", [], 50, needs="no-such-tool")) == "no-such-tool is not installed"
    assert why(run.Stage("real-model", [], 50)) == "no --model"


def test_a_run_keeps_its_summary_after_each_stage(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_run.py"), "--device", "cpu", "--only", "nccl"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = (tmp_path / "gpu_run" / "summary.md").read_text()
    assert "| nccl | passed |" in summary
    assert "| kernels | skipped | 0 | left out |" in summary
    result = json.loads((tmp_path / "gpu_run" / "nccl.log").read_text().splitlines()[-1])
    assert result["backend"] == "gloo"


def test_a_model_goes_in_parts(tmp_path):
    run = load("gpu_run")
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(range(256)) * 1_000)
    parts = run.split_file(model, tmp_path / "parts", 100_000)
    assert [part.stat().st_size for part in parts] == [100_000, 100_000, 56_000]
    assert len(run.split_file(model, tmp_path / "parts", 200_000)) == len(list((tmp_path / "parts").iterdir())) == 2
    parts = run.split_file(model, tmp_path / "parts", 100_000)
    joined = run.join_files(parts[::-1], tmp_path / "joined")
    assert Path(joined).read_bytes() == model.read_bytes()


@pytest.mark.usefixtures("on_triton")
def test_the_memory_checker_is_given_workloads_that_exist():
    from octavo_kernels.triton.workloads import workloads

    names = [workload.name for workload in workloads()]
    for text in load("gpu_run").CHECKED:
        assert any(text in name for name in names), text


@pytest.mark.usefixtures("on_triton")
def test_every_workload_has_a_name_of_its_own():
    from octavo_kernels.triton.workloads import workloads

    names = [workload.name for workload in workloads()]
    assert len(names) == len(set(names))
