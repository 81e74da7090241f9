"""Reach the API server: the pod's service account, else a kubeconfig file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import aiohttp
import kopf

from octavo_operator.api.errors import OctavoOperatorError
from octavo_operator.controller.client import KubeClient

TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
MAX_CONNECTIONS = 64


class NoCluster(OctavoOperatorError):  # noqa: N818
    """Neither a service account nor a kubeconfig is there."""


def find_cluster() -> kopf.ConnectionInfo:
    """How to connect. Raises `NoCluster`."""
    settings = kopf.OperatorSettings()
    info = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
    if info is None:
        raise NoCluster(
            "no Kubernetes cluster: there is neither a service account nor a kubeconfig (set KUBECONFIG, or make "
            "~/.kube/config)"
        )
    return info


def connect(info: kopf.ConnectionInfo, may_write: Callable[[], bool] = lambda: True) -> KubeClient:
    """A client; must be called within the event loop that uses it. It writes nothing while `may_write` says no."""
    connector = aiohttp.TCPConnector(ssl=info.as_ssl_context(), limit=MAX_CONNECTIONS)
    session = aiohttp.ClientSession(connector=connector, headers={"User-Agent": "octavo-operator"})

    def authorize() -> Mapping[str, str]:
        if TOKEN_FILE.exists():
            return {"Authorization": f"Bearer {TOKEN_FILE.read_text().strip()}"}
        headers: Mapping[str, str] = info.as_http_headers()
        return headers

    return KubeClient(info.server, session, authorize, may_write)
