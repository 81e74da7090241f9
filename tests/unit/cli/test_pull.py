from __future__ import annotations

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from octavo_cli.pull import CACHE_FOLDER, link, pull


def test_one_file_appears_in_the_folder_under_its_name(tmp_path: Path) -> None:
    found = tmp_path / "cache" / "m.gguf"
    found.parent.mkdir()
    found.write_text("weights")
    for _ in range(2):
        place = link(found, tmp_path / "model")
        assert place == tmp_path / "model" / "m.gguf"
        assert place.read_text() == "weights"
    assert not place.readlink().is_absolute(), "the volume may be mounted elsewhere"


def test_several_files_appear_as_the_folder_and_are_replaced_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        link(tmp_path / name, tmp_path / "model")
        assert (tmp_path / "model" / "config.json").read_text() == name


def test_a_local_file_is_pulled_and_a_missing_one_says_so(tmp_path: Path) -> None:
    app = Typer()
    app.command()(pull)
    source = tmp_path / "m.gguf"
    source.write_text("weights")
    result = CliRunner().invoke(app, [f"file://{source}", "--to", str(tmp_path / "volume" / "model")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "volume" / "model" / "m.gguf").read_text() == "weights"
    missing = CliRunner().invoke(app, [f"file://{tmp_path}/none.gguf", "--to", str(tmp_path / "model")])
    assert missing.exit_code == 1
    assert "none.gguf" in missing.stderr
    assert CACHE_FOLDER.startswith(".")


@pytest.mark.parametrize("uri", ["hf://", "gopher://x/y"])
def test_an_address_that_cannot_be_read_is_refused(uri: str, tmp_path: Path) -> None:
    app = Typer()
    app.command()(pull)
    assert CliRunner().invoke(app, [uri, "--to", str(tmp_path / "m")]).exit_code == 1
