from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer import Typer
from typer.testing import CliRunner

from octavo_cli.simulate import simulate_command, sparkline

ROOT = Path(__file__).parents[3]
SHORT = ["--duration", "120", "--high", "3", "--cold-start", "20"]


@pytest.fixture
def app() -> Typer:
    app = Typer()
    app.command()(simulate_command)
    return app


def test_laws_are_compared_on_a_trace(app: Typer) -> None:
    result = CliRunner().invoke(app, [*SHORT, "--trace", "step", "--json"])
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)
    assert reports[0]["law"] == "octavo"
    assert len(reports) == 9
    assert all(report["requests"] == reports[0]["requests"] > 0 for report in reports)


def test_a_manifest_brings_its_own_bounds(app: Typer) -> None:
    manifest = str(ROOT / "examples" / "smollm2.yaml")
    result = CliRunner().invoke(app, [*SHORT, "-f", manifest, "--no-peers", "--json", "--high", "30"])
    (report,) = json.loads(result.stdout)
    assert report["peak_replicas"] <= 2


def test_a_recorded_trace_is_played_and_a_bad_one_is_refused(app: Typer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,input_tokens,output_tokens\n0,100,10\n1,100,10\n")
    result = CliRunner().invoke(app, ["--recorded", str(trace), "--no-peers", "--json"])
    assert json.loads(result.stdout)[0]["requests"] == 2
    trace.write_text("time,input_tokens\n0,100\n")
    refused = CliRunner().invoke(app, ["--recorded", str(trace)])
    assert refused.exit_code == 2
    assert "line 2" in refused.stderr


def test_bars_show_the_course_of_replicas() -> None:
    assert sparkline([1, 1, 2, 4]) == "▂▂▄█"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1_000)))) <= 16


def test_cost_and_misses_of_every_law_are_drawn(app: Typer, tmp_path: Path) -> None:
    picture = tmp_path / "plane.svg"
    result = CliRunner().invoke(app, [*SHORT, "--trace", "steady", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    texts = [element.text for element in ElementTree.parse(picture).iter() if element.text]
    assert {"octavo", "replica-hours", "KEDA waiting>5"} <= set(texts)
