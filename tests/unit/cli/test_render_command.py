from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from octavo_cli.render import render

ROOT = Path(__file__).parents[3]


@pytest.fixture
def app() -> Typer:
    app = Typer()
    app.command()(render)
    return app


def test_objects_are_printed_as_yaml(app: Typer) -> None:
    result = CliRunner().invoke(app, ["-f", str(ROOT / "examples" / "smollm2.yaml")])
    assert result.exit_code == 0
    assert "Deployment" in [o["kind"] for o in yaml.safe_load_all(result.stdout)]


def test_every_error_is_named_and_the_exit_code_is_2(app: Typer, tmp_path: Path) -> None:
    manifest = tmp_path / "bad.yaml"
    manifest.write_text(
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: a}\n"
        "spec: {model: {storageUri: 'hf://a/b'}, replica: 1, drain: {timeoutSeconds: 0}}\n"
    )
    result = CliRunner().invoke(app, ["-f", str(manifest)])
    assert result.exit_code == 2
    assert "spec.replica: unknown field; did you mean replicas?" in result.stderr
    assert "spec.drain.timeoutSeconds" in result.stderr


def test_what_the_runtime_cannot_do_is_refused_too(app: Typer, tmp_path: Path) -> None:
    manifest = tmp_path / "bad.yaml"
    manifest.write_text(
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: a}\n"
        "spec: {model: {storageUri: 'hf://a/b', task: Transcribe}}\n"
    )
    result = CliRunner().invoke(app, ["-f", str(manifest)])
    assert result.exit_code == 2
    assert "spec.model.task" in result.stderr or "no runtime" in result.stderr
