"""`octavo quantize` takes settings, shows a report and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from octavo_cli.main import build_app
from octavo_engine.errors import ModelLoadError
from octavo_engine.quantize import pipeline
from octavo_engine.quantize.layout import Format
from octavo_engine.quantize.pipeline import OnProgress, QuantizeOptions
from octavo_engine.quantize.report import QuantizationReport
from octavo_engine.quantize.scheme import Method

REPORT = QuantizationReport(
    model="m",
    output="out",
    method="gptq",
    scheme="W4A16-g64",
    num_in_8_bits=0,
    num_quantized=210,
    calibration_tokens=1_000,
    evaluation_tokens=500,
    weight_bytes_before=400 << 20,
    weight_bytes_after=100 << 20,
    perplexity_before=10.0,
    perplexity_after=10.25,
    perplexity_change_error=0.004,
    seconds=61.0,
    peak_memory_bytes=3 << 30,
)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[QuantizeOptions]:
    """The options the engine is called with; it answers with a fixed report."""
    seen: list[QuantizeOptions] = []

    def answer(options: QuantizeOptions, on_progress: OnProgress) -> QuantizationReport:
        seen.append(options)
        on_progress("quantize", 0.5, "layer 1")
        return REPORT

    monkeypatch.setattr(pipeline, "quantize_model", answer)
    return seen


def run(*words: str):
    return CliRunner().invoke(build_app("quantize"), ["quantize", *words], env={"COLUMNS": "100"})


def test_the_report_shows_size_and_perplexity(given: list[QuantizeOptions]) -> None:
    result = run("hf://a/b", "-o", "out")
    assert result.exit_code == 0
    for words in ("400.0 MiB", "100.0 MiB", "-75.0%", "10.000", "10.250", "+2.50% ± 0.40%", "61 s", "octavo serve out"):
        assert words in result.output


def test_json_is_for_machines(given: list[QuantizeOptions]) -> None:
    assert json.loads(run("m", "-o", "out", "--json").stdout)["perplexity_after"] == 10.25


def test_settings_reach_the_engine(given: list[QuantizeOptions]) -> None:
    words = ["--method", "gptq", "--bits", "4", "--group-size", "32", "--asymmetric", "--format", "gptq"]
    run("m", "-o", "out", *words, "--calibration", "t.txt", "--windows", "7", "--ignore", "a", "--ignore", "b")
    (options,) = given
    assert (options.method, options.bits, options.group_size) == (Method.GPTQ, 4, 32)
    assert (options.symmetric, options.format) == (False, Format.GPTQ)
    assert (options.calibration, options.num_windows, options.ignore) == (Path("t.txt"), 7, ("a", "b"))


def test_smoothquant_means_eight_bits(given: list[QuantizeOptions]) -> None:
    run("m", "-o", "out", "--method", "smoothquant")
    run("m", "-o", "out")
    assert [options.bits for options in given] == [8, 4]


def test_what_the_engine_refuses_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelLoadError("hf://a/b: there is no such repository")

    monkeypatch.setattr(pipeline, "quantize_model", refuse)
    result = run("hf://a/b", "-o", "out")
    assert result.exit_code == 1
    assert result.output.strip() == "octavo quantize: hf://a/b: there is no such repository"


def test_a_wrong_method_lists_the_right_ones() -> None:
    result = run("m", "-o", "out", "--method", "magic")
    assert result.exit_code == 2
    assert all(name in result.output for name in ("rtn", "gptq", "awq", "smoothquant"))
