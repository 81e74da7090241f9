"""Which source of tenants the settings name: none, files, or the cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from octavo_gateway.discovery import ApiServer
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.tenancy.kubernetes import KubernetesTenants
from octavo_gateway.tenancy.source import TenantFiles
from octavo_gateway.tenancy.tenant import TenantDirectory

KUBERNETES = "kubernetes"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class TenantFollower(Protocol):
    """A source of tenants."""

    def load(self) -> TenantDirectory:
        """What to begin with; raises `ConfigError`. A cluster begins with nobody: no key opens anything yet."""

    async def run(self, on_change: Callable[[TenantDirectory], None]) -> None:
        """Tell every change until cancelled."""


def tenant_follower(settings: GatewaySettings, api_server: ApiServer | None) -> TenantFollower | None:
    """The source that `settings.tenants` names; None for a gateway open to everybody."""
    if settings.tenants is None:
        return None
    if settings.tenants != KUBERNETES:
        return TenantFiles(Path(settings.tenants))
    own = NAMESPACE_FILE.read_text(encoding="ascii").strip() if NAMESPACE_FILE.is_file() else "default"
    return KubernetesTenants(api_server or ApiServer.in_cluster(), settings.tenant_secrets_namespace or own)
