"""Discovery from a YAML file: models and their replicas, reread when it changes and probed for readiness."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import (
    CacheEvents,
    Endpoint,
    EndpointState,
    HoldPolicy,
    ModelEntry,
    Registry,
    RetryPolicy,
    Saturation,
    Strategy,
)
from octavo_gateway.upstream import UpstreamError, UpstreamPool

log = logging.getLogger("octavo.gateway.discovery")

POLL_S = 1.0
MAX_PROBE_BYTES = 64 * 1024
PROBE_TIMEOUT_S = 2.0
_ZMQ_ADDRESS = re.compile(r"tcp://(?:\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}|ipc://[^\0]{1,100}")


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    pass


class KvEventsSpec(_Part, frozen=True, kw_only=True):
    """What the replica was told as `--kv-events-endpoint` and `--kv-events-replay-endpoint`, as reached from here."""

    events: str
    replay: str


class EndpointSpec(_Part, frozen=True, kw_only=True):
    """One replica; `id` defaults to host:port."""

    url: str
    id: str = ""
    weight: float = 1.0
    adapters: list[str] = []
    kv_events: KvEventsSpec | None = None


class SaturationSpec(_Part, frozen=True, kw_only=True):
    queue_depth: int = 4
    kv_cache_utilization: float = 0.90


class RetrySpec(_Part, frozen=True, kw_only=True):
    attempts: int = 2
    per_try_timeout_seconds: float | None = None


class RoutingSpec(_Part, frozen=True, kw_only=True):
    """As `spec.routing` of an InferenceService."""

    strategy: Strategy = Strategy.PREFIX_AWARE
    session_header: str = "x-session-id"
    saturation: SaturationSpec = SaturationSpec()
    retry: RetrySpec = RetrySpec()


class ColdStartSpec(_Part, frozen=True, kw_only=True):
    """As `spec.autoscaling.coldStart` of an InferenceService."""

    max_held_requests: int = 500
    hold_timeout_seconds: float = 300.0


class ModelSpec(_Part, frozen=True, kw_only=True):
    name: str
    endpoints: list[EndpointSpec]
    aliases: list[str] = []
    adapters: list[str] = []
    ready_path: str = "/health"
    routing: RoutingSpec = RoutingSpec()
    cold_start: ColdStartSpec = ColdStartSpec()


class StaticFile(_Part, frozen=True, kw_only=True):
    """The whole file. `settings` are those of `octavo gateway`, `prices` are per model."""

    models: list[ModelSpec] = []
    settings: dict[str, Any] = {}
    prices: dict[str, Any] = {}


def load_static(path: Path) -> StaticFile:
    """Read and check the file; raises `ConfigError` naming file, field and value."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no valid YAML ({error})") from error
    try:
        parsed = msgspec.convert(content, StaticFile)
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at `$.")
        where = f"{field.rstrip('`')}: " if field else ""
        raise ConfigError(f"{path}: {where}{message}") from error
    _check(path, parsed)
    return parsed


def _check(path: Path, parsed: StaticFile) -> None:
    seen: set[str] = set()
    for number, model in enumerate(parsed.models):
        where = f"{path}: models[{number}]"
        if not model.name:
            raise ConfigError(f"{where}.name: must not be empty")
        for name in (model.name, *model.aliases, *model.adapters):
            if name in seen:
                raise ConfigError(f"{where}: the name {name!r} is used twice")
            seen.add(name)
        for index, endpoint in enumerate(model.endpoints):
            parts = urlsplit(endpoint.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
                raise ConfigError(
                    f"{where}.endpoints[{index}].url: must be http(s)://HOST:PORT without a path, got {endpoint.url!r}"
                )
            if endpoint.kv_events is not None:
                for field in ("events", "replay"):
                    address = getattr(endpoint.kv_events, field)
                    if not _ZMQ_ADDRESS.fullmatch(address):
                        raise ConfigError(
                            f"{where}.endpoints[{index}].kvEvents.{field}: must be tcp://HOST:PORT or ipc://PATH, "
                            f"got {address!r}"
                        )
            if endpoint.weight <= 0:
                raise ConfigError(f"{where}.endpoints[{index}].weight: must be above 0, got {endpoint.weight}")
        if model.routing.retry.attempts < 1:
            raise ConfigError(f"{where}.routing.retry.attempts: must be at least 1")


def to_entry(model: ModelSpec, ready: Mapping[str, bool]) -> ModelEntry:
    """The registry's form of a model; endpoints that did not answer their probe count as starting."""
    endpoints = []
    for spec in model.endpoints:
        name = spec.id or urlsplit(spec.url).netloc
        state = EndpointState.READY if ready.get(spec.url) else EndpointState.STARTING
        told = spec.kv_events
        events = None if told is None else CacheEvents(told.events, told.replay)
        adapters = frozenset(spec.adapters)
        endpoints.append(Endpoint(name, spec.url.rstrip("/"), state, spec.weight, adapters, cache_events=events))
    saturation, retry = model.routing.saturation, model.routing.retry
    return ModelEntry(
        name=model.name,
        endpoints=tuple(endpoints),
        aliases=tuple(model.aliases),
        adapters=tuple(model.adapters),
        strategy=model.routing.strategy,
        session_header=model.routing.session_header.lower(),
        saturation=Saturation(saturation.queue_depth, saturation.kv_cache_utilization),
        hold=HoldPolicy(model.cold_start.max_held_requests, model.cold_start.hold_timeout_seconds),
        retry=RetryPolicy(retry.attempts, retry.per_try_timeout_seconds),
    )


class StaticDiscovery:
    """Follows the file and the readiness of what it names; a broken edit is told and the last good view kept."""

    def __init__(self, path: Path, registry: Registry, pool: UpstreamPool) -> None:
        self._path = path
        self._registry = registry
        self._pool = pool
        self._stamp: tuple[int, int] | None = None
        self._file: StaticFile | None = None
        self._published: tuple[ModelEntry, ...] | None = None

    async def run(self) -> None:
        """Follow until cancelled. Raises `ConfigError` only if the file is wrong at the start."""
        self._file = load_static(self._path)
        while True:
            self._reread()
            await self.probe()
            await asyncio.sleep(POLL_S)

    async def probe(self) -> None:
        """Ask every endpoint whether it is ready, and publish what changed."""
        if self._file is None:
            self._file = load_static(self._path)
        targets = [(model, endpoint.url) for model in self._file.models for endpoint in model.endpoints]
        answers = await asyncio.gather(*(self._ready(url, model.ready_path) for model, url in targets))
        ready = {url: answer for (_, url), answer in zip(targets, answers, strict=True)}
        entries = tuple(
            replace(to_entry(model, ready), desired_replicas=len(model.endpoints)) for model in self._file.models
        )
        if entries != self._published:
            self._published = entries
            self._registry.publish(entries)

    def _reread(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._file = load_static(self._path)
        except (OSError, ConfigError) as error:
            log.error("keeping the last good models: %s", error)

    async def _ready(self, url: str, path: str) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                status, _ = await self._pool.get(Endpoint(url, url), path, MAX_PROBE_BYTES)
        except (UpstreamError, TimeoutError):
            return False
        return status == 200
