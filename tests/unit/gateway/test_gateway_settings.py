"""Settings: layers, types and messages."""

from __future__ import annotations

import pytest

from octavo_gateway.errors import ConfigError
from octavo_gateway.settings import GatewaySettings, load_settings


def test_flags_win_over_environment_over_file_over_defaults() -> None:
    settings = load_settings(
        {"port": 3},
        file_values={"port": 1, "idle-timeout": 7, "drain-timeout": 8},
        environment={"OCTAVO_GATEWAY_PORT": "2", "OCTAVO_GATEWAY_DRAIN_TIMEOUT": "9", "HOME": "/"},
    )

    assert (settings.port, settings.idle_timeout, settings.drain_timeout) == (3, 7, 9)
    assert settings.host == GatewaySettings().host


@pytest.mark.parametrize(
    ("flags", "file_values", "environment", "words"),
    [
        ({"port": 70_000}, {}, {}, ["port", "65535", "70000"]),
        ({}, {"prot": 1}, {}, ["f.yaml", "prot", "did you mean port?"]),
        ({}, {"port": "many"}, {}, ["f.yaml", "port"]),
        ({}, {}, {"OCTAVO_GATEWAY_IDLE_TIMEOT": "1"}, ["OCTAVO_GATEWAY_IDLE_TIMEOT", "did you mean idle_timeout?"]),
        ({"idle_timeout": 0.0}, {}, {}, ["idle_timeout", "above 0"]),
        ({"tls_key": "/no/where"}, {}, {}, ["tls_certificate", "both"]),
        ({"upstream_ca": "/no/where"}, {}, {}, ["upstream_ca", "/no/where"]),
        ({"log_level": "loud"}, {}, {}, ["log_level", "debug", "loud"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_layer(
    flags: dict[str, object], file_values: dict[str, object], environment: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, file_values=file_values, file_name="f.yaml", environment=environment)

    for word in words:
        assert word in str(caught.value)


def test_kubernetes_service_variables_are_not_settings() -> None:
    environment = {
        "OCTAVO_GATEWAY_PORT": "tcp://10.0.0.1:80",
        "OCTAVO_GATEWAY_PORT_80_TCP": "tcp://10.0.0.1:80",
        "OCTAVO_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "OCTAVO_GATEWAY_SERVICE_PORT": "80",
    }

    assert load_settings({}, environment=environment) == GatewaySettings()
