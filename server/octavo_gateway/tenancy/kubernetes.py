"""Tenants from a cluster: InferenceTenant resources, and the Secrets with hashed keys beside the gateway."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from octavo_gateway.discovery.kube_api import ApiServer, Item, Watched, follow
from octavo_gateway.errors import ConfigError
from octavo_gateway.tenancy.source import Secrets, to_tenant
from octavo_gateway.tenancy.tenant import Reading, Tenant, TenantDirectory
from octavo_operator.api.inference_tenant import InferenceTenant

log = logging.getLogger("octavo.gateway.tenancy")

SETTLE_S = 0.05


def build_from_cluster(resources: Iterable[Item], secrets: Iterable[Item]) -> TenantDirectory:
    """Join what was watched. Pure; a tenant that cannot be read is told and left out: its keys open nothing.

    A key that two tenants claim opens neither.
    """
    values: Secrets = {str(s["metadata"]["name"]): _texts(s.get("data") or {}) for s in secrets}
    tenants: list[Tenant] = []
    problems: dict[str, str] = {}
    generations: dict[str, int] = {}
    for item in resources:
        name = item["metadata"]["name"]
        generations[name] = int(item["metadata"].get("generation") or 0)
        try:
            resource = InferenceTenant.model_validate({k: v for k, v in item.items() if k != "status"})
            tenants.append(to_tenant(resource, values, "kubernetes"))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            problems[name] = f"{where}: {first['msg']}"
        except ConfigError as error:
            problems[name] = str(error)
    holders: dict[bytes, set[str]] = {}
    for tenant in tenants:
        for key in tenant.keys:
            holders.setdefault(key.digest, set()).add(tenant.name)
    disputed = {digest for digest, names in holders.items() if len(names) > 1}
    for tenant in tenants:
        if lost := sum(key.digest in disputed for key in tenant.keys):
            problems[tenant.name] = f"{lost} of its keys belong to other tenants too and are refused"
    for name, problem in problems.items():
        log.error("kubernetes: InferenceTenant %s: %s", name, problem)
    opening = {tenant.name: _without(tenant, disputed) for tenant in tenants}
    counts = {name: len(tenant.keys) for name, tenant in opening.items()}
    readings = (Reading(n, g, counts.get(n, 0), problems.get(n, "")) for n, g in sorted(generations.items()))
    return TenantDirectory(opening.values(), readings)


def _without(tenant: Tenant, disputed: set[bytes]) -> Tenant:
    return replace(tenant, keys=tuple(key for key in tenant.keys if key.digest not in disputed))


def _texts(data: Mapping[str, str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, encoded in data.items():
        try:
            values[name] = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            log.error("kubernetes: a Secret's entry %s is no text", name)
    return values


class KubernetesTenants:
    """Follows tenants and their Secrets; a removed key is refused as soon as the watch tells."""

    def __init__(self, server: ApiServer, secrets_namespace: str, options: Mapping[str, Any] | None = None) -> None:
        self._server = server
        self._options = dict(options or {})
        self.tenants = Watched("/apis/serving.octavo.dev/v1alpha1/inferencetenants")
        self.secrets = Watched(f"/api/v1/namespaces/{secrets_namespace}/secrets")

    def load(self) -> TenantDirectory:
        """Nobody gets in before the cluster's tenants are known."""
        return TenantDirectory(known=False)

    async def run(self, on_change: Callable[[TenantDirectory], None]) -> None:
        """Follow until cancelled."""

        def publish() -> None:
            on_change(build_from_cluster(self.tenants.items.values(), self.secrets.items.values()))

        await follow(self._server, (self.tenants, self.secrets), publish, SETTLE_S, **self._options)
