"""What is served where: models, their aliases and adapters, and the endpoints behind them, as immutable snapshots."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from urllib.parse import urlsplit


class EndpointState(enum.StrEnum):
    """Where a replica is in its life. Only READY ones receive new requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Strategy(enum.StrEnum):
    """Routing strategy of a service (`spec.routing.strategy`)."""

    ROUND_ROBIN = "RoundRobin"
    LEAST_LOADED = "LeastLoaded"
    POWER_OF_TWO = "PowerOfTwo"
    PREFIX_AWARE = "PrefixAware"
    SESSION = "Session"


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """ZeroMQ addresses at which a replica tells what becomes of its prefix cache, and what it holds."""

    events: str
    replay: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One replica. `id` is stable over its life (pod name, process name); `url` is `http[s]://host:port`."""

    id: str
    url: str
    state: EndpointState = EndpointState.READY
    weight: float = 1.0
    adapters: frozenset[str] = frozenset()
    revision: str = ""
    canary: bool = False  # of a revision on trial beside the one that serves
    cache_events: CacheEvents | None = None

    @property
    def address(self) -> tuple[str, int, bool]:
        """(host, port, uses TLS)."""
        return _address(self.url)


@lru_cache(maxsize=4_096)
def _address(url: str) -> tuple[str, int, bool]:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return parts.hostname or "", parts.port or (443 if tls else 80), tls


@dataclass(frozen=True, slots=True)
class Saturation:
    """The line above which requests wait in the gateway instead of in a replica (late binding).

    The same numbers feed admission in the engine and the autoscaler's view of "full".
    """

    queue_depth: int = 4
    kv_cache_utilization: float = 0.90


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """How many requests may wait for a replica of this model, and for how long."""

    max_held_requests: int = 500
    hold_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts in total, the first included; retries happen only before the first byte of an answer."""

    attempts: int = 2
    per_try_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One served model as the gateway sees it. `adapters` are LoRA names addressed as models of their own."""

    name: str
    endpoints: tuple[Endpoint, ...] = ()
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    namespace: str = ""
    created: int = 0
    strategy: Strategy = Strategy.PREFIX_AWARE
    session_header: str = "x-session-id"
    saturation: Saturation = field(default_factory=Saturation)
    hold: HoldPolicy = field(default_factory=HoldPolicy)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    scale_to_zero: bool = False
    desired_replicas: int | None = None
    scaling_reason: str = ""
    canary_weight: int | None = None  # percent of requests for canary endpoints; None when no canary runs

    @property
    def ready(self) -> tuple[Endpoint, ...]:
        """The endpoints that take new requests."""
        return tuple(e for e in self.endpoints if e.state is EndpointState.READY)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A requested model name found: the service's entry, and the adapter if the name is one."""

    entry: ModelEntry
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All models at one moment; a new one replaces it whole, so readers never see half a change."""

    models: Mapping[str, ModelEntry] = field(default_factory=lambda: MappingProxyType({}))
    names: Mapping[str, Resolved] = field(default_factory=lambda: MappingProxyType({}))
    conflicts: tuple[str, ...] = ()
    version: int = 0

    def resolve(self, name: str) -> Resolved | None:
        """Find a model by name, alias or adapter name."""
        return self.names.get(name)

    def listing(self) -> list[tuple[str, Resolved]]:
        """Every name a client may use, sorted."""
        return sorted(self.names.items())


def build_snapshot(entries: Iterable[ModelEntry], version: int = 0) -> Snapshot:
    """Index entries by every name. Names are first come, first served; the losers are told in `conflicts`.

    A model's own name beats an alias, an alias beats an adapter, so adding an alias cannot hijack a model.
    """
    models: dict[str, ModelEntry] = {}
    names: dict[str, Resolved] = {}
    conflicts: list[str] = []
    for entry in entries:
        if entry.name in models:
            conflicts.append(
                f"model name {entry.name!r} of namespace {entry.namespace or '-'} is already served by "
                f"namespace {models[entry.name].namespace or '-'}"
            )
            continue
        models[entry.name] = entry
        names[entry.name] = Resolved(entry)

    def claim(kind: str, name: str, resolved: Resolved) -> None:
        holder = names.setdefault(name, resolved)
        if holder.entry is not resolved.entry:
            conflicts.append(
                f"{kind} {name!r} of model {resolved.entry.name!r} is taken by model {holder.entry.name!r}"
            )

    for entry in models.values():
        for alias in entry.aliases:
            claim("alias", alias, Resolved(entry))
    for entry in models.values():
        for adapter in entry.adapters:
            claim("adapter", adapter, Resolved(entry, adapter))
    return Snapshot(MappingProxyType(models), MappingProxyType(names), tuple(conflicts), version)


class Registry:
    """Holds the current snapshot and tells listeners when it changes. Used from one event loop."""

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._published = False

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def synced(self) -> bool:
        """True once discovery has published its first full view."""
        return self._published

    def publish(self, entries: Iterable[ModelEntry]) -> None:
        """Replace everything that is known by this full view."""
        self._snapshot = build_snapshot(entries, self._snapshot.version + 1)
        self._published = True
        for listener in self._listeners:
            listener(self._snapshot)

    def subscribe(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` after each change."""
        self._listeners.append(listener)
