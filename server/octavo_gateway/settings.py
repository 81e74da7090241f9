"""The settings of `octavo gateway`: defaults < config file < environment < flags, one typed object."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from octavo_gateway.errors import ConfigError
from octavo_gateway.usage.ledger import SPOOL_BYTES

ENV_PREFIX = "OCTAVO_GATEWAY_"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the gateway can be told. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free port
    workers: int = 1  # processes that share the port
    connect_timeout: float = 2.0
    first_byte_timeout: float = 300.0
    idle_timeout: float = 120.0  # longest silence inside an answer, from the replica or to the client
    request_timeout: float = 3_600.0
    body_timeout: float = 60.0
    header_timeout: float = 15.0
    max_body_bytes: int = 8 * 1024 * 1024
    max_header_bytes: int = 32 * 1024
    heartbeat_interval: float = 5.0  # comment lines to a held stream
    drain_propagation: float = 0.0  # keep accepting this long after readiness says no
    drain_timeout: float = 30.0
    report_interval: float = 1.0  # how often each replica's metrics are read
    upstream_keep_alive: float = 4.0
    resume: bool = True  # go on at another replica when one dies in the middle of a stream
    prefix_index_blocks: int = 500_000
    debug_headers: bool = False  # tell replica and routing reason in x-octavo-* response headers
    access_log: bool = True
    log_level: str = "info"
    log_format: str = "json"
    otlp_endpoint: str | None = None  # collector of traces, such as http://otel:4318
    metrics_port: int | None = None  # /metrics and /health on a port of their own, on `host`; no key needed there
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # None: no admin API
    admin_token: str | None = None  # what the admin API asks for; best given as OCTAVO_GATEWAY_ADMIN_TOKEN
    tenants: str | None = None  # file or folder of InferenceTenants and Secrets, or "kubernetes"; None: open to all
    tenant_secrets_namespace: str | None = None  # where a cluster's key Secrets are; None: where this pod is
    redis_url: str | None = None  # limits are shared by all gateways through it; None: each gateway has its own
    ledger: str | None = None  # folder of the usage ledger; None: nothing is recorded
    ledger_url: str | None = None  # PostgreSQL that keeps the records; the folder is then its spool
    ledger_spool_bytes: int = SPOOL_BYTES  # while the database is away; beyond it new requests are refused
    batch_folder: str | None = None  # where tenants' files and batches are; None: /v1/files and /v1/batches are off
    batch_file_bytes: int = 64 * 1024 * 1024
    batch_tenant_bytes: int = 1024**3  # all files of one tenant
    batch_retention: float = 30 * 86_400.0  # how long files and ended batches stay
    tls_certificate: str | None = None
    tls_key: str | None = None
    upstream_ca: str | None = None  # PEM file that replicas' certificates must chain to
    upstream_certificate: str | None = None  # client certificate shown to replicas (mutual TLS)
    upstream_key: str | None = None
    upstream_server_name: str | None = None  # the name in every replica's certificate; None: the host of its address

    def validate(self) -> None:
        """Raise `ConfigError` naming the first setting that cannot work."""
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port: must be between 0 and 65535, got {self.port}")
        if not 1 <= self.workers <= 256:
            raise ConfigError(f"workers: must be between 1 and 256, got {self.workers}")
        for name in _POSITIVE_TIMES:
            if not 0 < getattr(self, name) <= 86_400:
                raise ConfigError(f"{name}: must be above 0 and at most 86400 seconds, got {getattr(self, name)}")
        for name in ("drain_propagation", "drain_timeout"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise ConfigError(f"{name}: must be between 0 and 86400 seconds, got {getattr(self, name)}")
        for name, least in (
            ("max_body_bytes", 1_024),
            ("max_header_bytes", 1_024),
            ("prefix_index_blocks", 1),
            ("ledger_spool_bytes", 65_536),
            ("batch_file_bytes", 1_024),
            ("batch_tenant_bytes", 1_024),
            ("batch_retention", 60),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        for name, choices in (("log_level", LOG_LEVELS), ("log_format", LOG_FORMATS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65_535:
            raise ConfigError(f"metrics_port: must be between 0 and 65535, got {self.metrics_port}")
        if self.admin_port is not None:
            if not 0 <= self.admin_port <= 65_535:
                raise ConfigError(f"admin_port: must be between 0 and 65535, got {self.admin_port}")
            if not self.admin_token or len(self.admin_token) < 16:
                raise ConfigError("admin_token: the admin API needs one of at least 16 characters")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint: must be an http(s) address, got {self.otlp_endpoint!r}")
        if self.ledger_url is not None:
            if not self.ledger_url.startswith(("postgresql://", "postgres://")):
                raise ConfigError("ledger_url: must begin with postgresql://")
            if self.ledger is None:
                raise ConfigError("ledger: name a folder too; records wait there while PostgreSQL is away")
        for pair in (("tls_certificate", "tls_key"), ("upstream_certificate", "upstream_key")):
            if (getattr(self, pair[0]) is None) != (getattr(self, pair[1]) is None):
                raise ConfigError(f"{pair[0]} and {pair[1]}: give both or neither")
        for name in ("tls_certificate", "tls_key", "upstream_ca", "upstream_certificate", "upstream_key"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}: no file at {path}")

    def describe(self) -> str:
        """Every effective setting as YAML, fit for the log."""
        shown = msgspec.to_builtins(self)
        if self.admin_token is not None:
            shown["admin_token"] = "(set)"  # noqa: S105 - hides it
        for name in ("redis_url", "ledger_url"):  # may hold a password
            if shown[name] is not None:
                shown[name] = "(set)"
        return yaml.safe_dump(shown, sort_keys=False, default_flow_style=False).rstrip()


_POSITIVE_TIMES = (
    "connect_timeout",
    "first_byte_timeout",
    "idle_timeout",
    "request_timeout",
    "body_timeout",
    "header_timeout",
    "heartbeat_interval",
    "report_interval",
    "upstream_keep_alive",
)
FIELDS = GatewaySettings.__struct_fields__


def load_settings(
    flags: Mapping[str, Any],
    *,
    file_values: Mapping[str, Any] | None = None,
    file_name: str = "config file",
    environment: Mapping[str, str] | None = None,
) -> GatewaySettings:
    """Merge the layers into one validated object; raises `ConfigError` that names the layer and the key.

    `flags` holds only what was given on the command line; `file_values` is the `settings:` part of the config file.
    """
    merged: dict[str, Any] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (file_name, {key.replace("-", "_"): value for key, value in (file_values or {}).items()}),
        ("environment", _read_environment(environment or {})),
        ("command line", flags),
    ]
    for source, values in layers:
        _convert(values, source)
        merged.update(values)
    settings = _convert(merged, "settings", strict=False)
    settings.validate()
    return settings


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """`OCTAVO_GATEWAY_<SETTING>`; Kubernetes' service variables (`..._PORT_...`) are skipped."""
    values: dict[str, Any] = {}
    for key, value in environment.items():
        if not key.startswith(ENV_PREFIX):
            continue
        name = key.removeprefix(ENV_PREFIX).lower()
        if name in FIELDS and not (name == "port" and "://" in value):
            values[name] = value
        elif difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85) and not name.startswith(("port_", "service_")):
            if name == "port":
                continue
            raise ConfigError(f"environment: {key}: unknown setting{_hint(name)}")
    return values


def _convert(values: Mapping[str, Any], source: str, strict: bool | None = None) -> GatewaySettings:
    for key in values:
        if key not in FIELDS:
            raise ConfigError(f"{source}: {key}: unknown setting{_hint(key)}")
    lax = source == "environment" if strict is None else not strict  # environment values are text
    try:
        return msgspec.convert(dict(values), GatewaySettings, strict=not lax)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ConfigError(f"{source}: {path.rstrip('`') or 'settings'}: {message}") from error


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, FIELDS, n=1)
    return f"; did you mean {close[0]}?" if close else ""
