"""Sampling defaults of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_server.generation_config import SamplingDefaults, read_sampling_defaults


def test_a_checkpoint_without_the_file_has_no_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(str(tmp_path)) == SamplingDefaults()
    assert read_sampling_defaults(str(tmp_path / "model.gguf")) == SamplingDefaults()


def test_known_fields_are_read_and_others_ignored(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true, "eos_token_id": [1, 2]}'
    )

    defaults = read_sampling_defaults(str(tmp_path))

    assert defaults == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert defaults.describe() == "temperature 0.6, top_p 0.95, top_k 20"


@pytest.mark.parametrize("content", ["not json", '{"temperature": "hot"}', "[]", "{" * 10_000])
def test_a_file_that_makes_no_sense_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)

    assert read_sampling_defaults(str(tmp_path)) == SamplingDefaults()
