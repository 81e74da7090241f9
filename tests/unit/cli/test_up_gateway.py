"""The gateway of `octavo up`: its config file, its environment, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_cli.up import gateway_of
from octavo_gateway.errors import ConfigError

CONFIG = """
prices: {smollm2: {input: 0.10, output: 0.40}}
settings: {admin-port: 8001, log-level: info}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    return path


def test_prices_and_settings_come_from_the_file_the_environment_and_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_GATEWAY_ADMIN_TOKEN", "a-token-of-some-length")
    monkeypatch.setenv("OCTAVO_GATEWAY_ADMIN_PORT", "8002")

    settings, prices = gateway_of(write(tmp_path, CONFIG), {"host": "127.0.0.1", "port": 0})

    assert (settings.port, settings.admin_port, settings.log_level) == (0, 8002, "info")
    assert (settings.access_log, settings.debug_headers) == (False, True)
    assert prices.cost("smollm2", 1_000_000, 0, 1_000_000) == pytest.approx(0.5)


def test_without_a_file_nothing_costs_anything() -> None:
    settings, prices = gateway_of(None, {"port": 0})

    assert settings.log_level == "warning"
    assert prices.cost("smollm2", 10, 0, 10) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('models: [{name: m, endpoints: [{url: "http://h:1"}]}]', "models: octavo up serves those of its manifests"),
        ("settings: {workers: 2}", "workers: octavo up runs one gateway process"),
        ("prices: {m: {input: -1}}", "prices.m: must not be negative"),
        ("settings: {admin-prot: 1}", "did you mean admin_port"),
    ],
)
def test_what_cannot_work_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gateway_of(write(tmp_path, text), {"port": 0})
