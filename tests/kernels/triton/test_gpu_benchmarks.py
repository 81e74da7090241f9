"""The GPU benchmarks refuse clearly without a GPU, and their comparison with references catches what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

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
    for stage in load("gpu_run").stages(tmp_path, "card"):
        for word in stage.command:
            if word.endswith(".py"):
                assert Path(word).is_file()


@pytest.mark.usefixtures("on_triton")
def test_every_workload_has_a_name_of_its_own():
    from octavo_kernels.triton.workloads import workloads

    names = [workload.name for workload in workloads()]
    assert len(names) == len(set(names))
