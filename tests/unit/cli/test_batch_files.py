"""The files of `octavo batch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo_batches.lines import BatchFileError, finished_ids
from octavo_cli.batch import read_requests

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "stream": True}}


def test_requests_are_read_without_their_stream_flag(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(LINE) + "\n\n" + json.dumps({**LINE, "custom_id": "b"}) + "\n")

    first, second = read_requests(file, model="other")

    assert (first.custom_id, second.custom_id) == ("a", "b")
    assert first.body == {"prompt": "x", "model": "other"}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("nonsense", "line 1: is not valid JSON"),
        ("[]", "line 1: must be a JSON object"),
        (json.dumps({**LINE, "custom_id": ""}), "custom_id"),
        (json.dumps({**LINE, "url": "/metrics"}), "url"),
        (json.dumps({**LINE, "method": "GET"}), "method"),
        (json.dumps({**LINE, "body": []}), "body"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE), "line 2: custom_id 'a' is used twice"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_sent(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(line)

    with pytest.raises(BatchFileError, match=named):
        list(read_requests(file))


def test_results_already_there_are_skipped_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    good = json.dumps({"custom_id": "a", "error": None})
    bad = json.dumps({"custom_id": "b", "error": {"code": "500"}})
    file.write_text(f"{good}\n{bad}\n" + '{"custom_id": "c", "err')

    assert finished_ids(file) == {"a", "b"}
    assert file.read_text() == f"{good}\n{bad}\n"
    assert finished_ids(file, retry_failed=True) == {"a"}
    assert file.read_text() == f"{good}\n"


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("a diary\n")

    with pytest.raises(BatchFileError, match="line 1"):
        finished_ids(file)
    assert file.read_text() == "a diary\n"
