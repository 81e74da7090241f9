"""A tenant and the directory that finds it by API key."""

from __future__ import annotations

import fnmatch
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from octavo_gateway.tenancy.keys import MAX_KEY_CHARS, hash_key


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits over all keys of a tenant; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    max_queued_requests: int | None = None
    tokens_per_day: int | None = None
    cost_per_day: float | None = None
    tokens_per_month: int | None = None
    cost_per_month: float | None = None

    def shared_among(self, count: int) -> Limits:
        """The part that each of `count` workers may give out, so that together they never exceed the whole.

        At least one of each: a limit slows a tenant, it forbids nothing. Budgets stay whole: all workers fill them from
        one ledger.
        """

        def part(limit: int | None) -> int | None:
            return None if limit is None else max(1, limit // count)

        return replace(
            self,
            requests_per_minute=part(self.requests_per_minute),
            tokens_per_minute=part(self.tokens_per_minute),
            input_tokens_per_minute=part(self.input_tokens_per_minute),
            output_tokens_per_minute=part(self.output_tokens_per_minute),
            max_concurrent_requests=part(self.max_concurrent_requests),
        )


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One API key: its name in usage records, and the SHA-256 that proves it."""

    name: str
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who may ask for what. `priority`: higher is served earlier, as in the InferenceTenant resource."""

    name: str
    keys: tuple[KeyRecord, ...] = ()
    display_name: str = ""
    suspended: bool = False
    allowed_models: tuple[str, ...] = ("*",)
    weight: float = 1.0
    priority: int = 0
    max_priority: int | None = None
    limits: Limits = field(default_factory=Limits)

    def may_use(self, model: str) -> bool:
        """Whether a model name (or alias, or adapter) is allowed; `*` stands for any characters."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.allowed_models)

    def queue_priority(self, asked: int | None) -> int:
        """The engine's and queue's priority (lower is earlier): what was asked for, within what is allowed."""
        ceiling = self.priority if self.max_priority is None else max(self.max_priority, self.priority)
        return max(-ceiling, -self.priority if asked is None else asked)


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller."""

    tenant: Tenant
    key_name: str


@dataclass(frozen=True, slots=True)
class Reading:
    """How one InferenceTenant was read: its generation, how many keys open something, and what is wrong with it."""

    name: str
    generation: int
    keys: int = 0
    problem: str = ""


class TenantDirectory:
    """Tenants by name, and by key. Immutable: a change makes a new one.

    The first bytes of the hash find the candidates and the whole hash is compared in constant time, so the time
    taken tells nothing useful about any stored key. One that is not `known` yet opens nothing, and refuses nobody for
    good either.
    """

    def __init__(self, tenants: Iterable[Tenant] = (), readings: Iterable[Reading] = (), *, known: bool = True) -> None:
        """`readings` are of the resources that the tenants come from, for the operator."""
        self.readings = tuple(readings)
        self.known = known
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self._by_prefix: dict[bytes, list[tuple[bytes, Identity]]] = {}
        for tenant in self.tenants.values():
            for key in tenant.keys:
                self._by_prefix.setdefault(key.digest[:4], []).append((key.digest, Identity(tenant, key.name)))

    def shared_among(self, count: int) -> TenantDirectory:
        """The same tenants with a worker's part of their limits."""
        if count == 1 or not self.known:
            return self
        parts = (replace(t, limits=t.limits.shared_among(count)) for t in self.tenants.values())
        return TenantDirectory(parts, self.readings)

    @property
    def num_keys(self) -> int:
        return sum(len(found) for found in self._by_prefix.values())

    def authenticate(self, key: str) -> Identity | None:
        """The caller behind a key, or None."""
        if len(key) > MAX_KEY_CHARS:
            return None
        digest = hash_key(key)
        for known, identity in self._by_prefix.get(digest[:4], ()):
            if hmac.compare_digest(known, digest):
                return identity
        return None
