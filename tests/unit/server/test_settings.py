"""Defaults < config file < environment < flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_engine.errors import ConfigError
from octavo_server.settings import load_settings


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: from-file\nport: 1\nhost: file\nmax-num-seqs: 3\n")

    settings = load_settings(
        {"port": 3}, config_file=str(file), environment={"OCTAVO_PORT": "2", "OCTAVO_HOST": "environment"}
    )

    assert (settings.model, settings.port, settings.host, settings.max_num_seqs) == ("from-file", 3, "environment", 3)


def test_environment_values_are_read_as_their_type() -> None:
    environment = {
        "OCTAVO_ENABLE_PREFIX_CACHING": "false",
        "OCTAVO_DRAIN_TIMEOUT": "1.5",
        "OCTAVO_SERVED_MODEL_NAME": "a,b",
    }

    settings = load_settings({"model": "m"}, environment=environment)

    assert settings.enable_prefix_caching is False
    assert settings.drain_timeout == 1.5
    assert settings.served_model_names == ("a", "b")


def test_service_links_of_kubernetes_are_left_alone() -> None:
    environment = {"OCTAVO_PORT": "tcp://10.0.0.1:80", "OCTAVO_SERVICE_HOST": "10.0.0.1", "OCTAVO_PORT_80_TCP": "x"}

    assert load_settings({"model": "m"}, environment=environment).port == 8000


@pytest.mark.parametrize(
    ("content", "named"),
    [("max_num_sequences: 3", "max_num_seqs"), ("- a", "mapping"), ("port: high", "port"), ("a: [", "YAML")],
)
def test_a_wrong_file_is_refused_with_its_name_and_key(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)

    with pytest.raises(ConfigError, match=named) as caught:
        load_settings({"model": "m"}, config_file=str(file))
    assert "serve.yaml" in str(caught.value)


def test_a_misspelt_variable_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean OCTAVO_MAX_NUM_SEQS"):
        load_settings({"model": "m"}, environment={"OCTAVO_MAX_NUM_SEQ": "1"})


def test_the_engine_gets_its_share() -> None:
    config = load_settings({"model": "m", "max_num_seqs": 7, "port": 9}).engine_config()

    assert (config.model, config.max_num_seqs) == ("m", 7)
    assert not hasattr(config, "port")
