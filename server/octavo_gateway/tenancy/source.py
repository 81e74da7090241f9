"""Tenants from files: InferenceTenant manifests and the Secrets with their hashed keys, reread when they change."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from octavo_gateway.errors import ConfigError
from octavo_gateway.tenancy.keys import parse_hash
from octavo_gateway.tenancy.tenant import KeyRecord, Limits, Tenant, TenantDirectory
from octavo_operator.api.inference_tenant import InferenceTenant

log = logging.getLogger("octavo.gateway.tenancy")

POLL_S = 1.0
SUFFIXES = (".yaml", ".yml")

Secrets = dict[str, dict[str, str]]


def load_tenants(path: Path) -> TenantDirectory:
    """Read a file, or every YAML file of a folder; raises `ConfigError` naming file, resource and field."""
    documents = [(file, document) for file in _files(path) for document in _documents(file)]
    secrets: Secrets = {}
    resources: list[tuple[str, InferenceTenant]] = []
    for file, document in documents:
        kind = document.get("kind")
        if kind == "Secret":
            secrets[str((document.get("metadata") or {}).get("name"))] = _secret_values(file, document)
        elif kind == "InferenceTenant":
            resources.append((str(file), _parse(file, document)))
        else:
            raise ConfigError(f"{file}: kind: must be InferenceTenant or Secret, got {kind!r}")
    return build_directory(resources, secrets)


def build_directory(resources: Iterable[tuple[str, InferenceTenant]], secrets: Secrets) -> TenantDirectory:
    """Join resources with the Secrets they name; raises `ConfigError`."""
    tenants: dict[str, Tenant] = {}
    holders: dict[bytes, str] = {}
    for origin, resource in resources:
        tenant = to_tenant(resource, secrets, origin)
        if tenant.name in tenants:
            raise ConfigError(f"{origin}: tenant {tenant.name!r} is defined twice")
        for key in tenant.keys:
            if (holder := holders.setdefault(key.digest, tenant.name)) != tenant.name:
                raise ConfigError(f"{origin}: key {key.name!r} of tenant {tenant.name!r} also belongs to {holder!r}")
        tenants[tenant.name] = tenant
    return TenantDirectory(tenants.values())


def to_tenant(resource: InferenceTenant, secrets: Secrets, origin: str) -> Tenant:
    """The gateway's form of one resource; raises `ConfigError` for keys that are missing or no hashes."""
    spec = resource.spec
    keys: list[KeyRecord] = []
    for ref in spec.key_secret_refs:
        if ref.name not in secrets:
            raise ConfigError(f"{origin}: tenant {resource.metadata.name!r}: there is no Secret {ref.name!r}")
        for name, value in secrets[ref.name].items():
            try:
                keys.append(KeyRecord(name, parse_hash(value)))
            except ValueError as error:
                raise ConfigError(f"{origin}: Secret {ref.name!r}: {name}: {error}") from None
    limits = spec.limits
    return Tenant(
        name=resource.metadata.name,
        keys=tuple(keys),
        display_name=spec.display_name,
        suspended=spec.suspended,
        allowed_models=tuple(spec.allowed_models),
        weight=float(spec.weight),
        priority=spec.priority,
        max_priority=spec.max_priority,
        limits=Limits(
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            input_tokens_per_minute=limits.input_tokens_per_minute,
            output_tokens_per_minute=limits.output_tokens_per_minute,
            max_concurrent_requests=limits.max_concurrent_requests,
            max_queued_requests=limits.max_queued_requests,
            tokens_per_day=limits.tokens_per_day,
            cost_per_day=None if limits.cost_per_day is None else float(limits.cost_per_day),
            tokens_per_month=limits.tokens_per_month,
            cost_per_month=None if limits.cost_per_month is None else float(limits.cost_per_month),
        ),
    )


class TenantFiles:
    """Follows the files: a key removed there is refused within about a second. A broken edit is told and ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[tuple[str, int, int], ...] = ()

    def load(self) -> TenantDirectory:
        """Read once; raises `ConfigError`."""
        self._stamp = self._read_stamp()
        return load_tenants(self._path)

    async def run(self, on_change: Callable[[TenantDirectory], None]) -> None:
        """Follow until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                stamp = self._read_stamp()
                if stamp != self._stamp:
                    self._stamp = stamp
                    on_change(load_tenants(self._path))
                    log.info("tenants: read anew from %s", self._path)
            except (OSError, ConfigError) as error:
                log.error("tenants: keeping the last good ones: %s", error)

    def _read_stamp(self) -> tuple[tuple[str, int, int], ...]:
        status = [(str(file), file.stat()) for file in _files(self._path)]
        return tuple((name, s.st_mtime_ns, s.st_size) for name, s in status)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if not path.is_file():
        raise ConfigError(f"tenants: no file or folder at {path}")
    return [path]


def _documents(file: Path) -> list[dict[str, Any]]:
    try:
        documents = [d for d in yaml.safe_load_all(file.read_text(encoding="utf-8")) if d is not None]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{file}: is no valid YAML") from None
    for document in documents:
        if not isinstance(document, dict):
            raise ConfigError(f"{file}: every document must be a mapping")
    return documents


def _parse(file: Path, document: dict[str, Any]) -> InferenceTenant:
    try:
        return InferenceTenant.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ConfigError(f"{file}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def _secret_values(file: Path, document: dict[str, Any]) -> dict[str, str]:
    values = {str(k): str(v) for k, v in (document.get("stringData") or {}).items()}
    for name, encoded in (document.get("data") or {}).items():
        try:
            values[str(name)] = base64.b64decode(str(encoded), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ConfigError(f"{file}: Secret: data.{name}: is no base64 text") from None
    return values
