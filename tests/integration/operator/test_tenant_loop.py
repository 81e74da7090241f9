"""The status of tenants, read from real gateways that joined resources and Secrets."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.tenancy.keys import format_hash, hash_key, new_key
from octavo_gateway.tenancy.kubernetes import build_from_cluster
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.kinds import INFERENCE_TENANT, POD
from octavo_operator.controller.replicas import ADDRESS_ANNOTATION
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store
from octavo_operator.controller.tenants import TenantLoop

KEY = new_key()


def tenant(name: str, secret: str, generation: int = 1) -> dict[str, Any]:
    return {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceTenant",
        "metadata": {"name": name, "generation": generation},
        "spec": {"keySecretRefs": [{"name": secret}]},
    }


def secret(name: str, *keys: str) -> dict[str, Any]:
    data = {f"key-{i}": base64.b64encode(format_hash(hash_key(k)).encode()).decode() for i, k in enumerate(keys)}
    return {"metadata": {"name": name}, "data": data}


def metrics_address(server: GatewayServer) -> str:
    assert server.listeners is not None
    address = server.listeners.metrics_address
    assert address is not None
    return address


class Statuses(KubeClient):
    """A client that keeps what is written."""

    def __init__(self, session: aiohttp.ClientSession, store: Store) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self._store = store
        self.written = 0

    async def patch_status(self, kind: Kind, namespace: str | None, name: str, status: dict[str, Any]) -> Any:
        self.written += 1
        return {**(self._store.get(kind, namespace, name) or {}), "status": status}


class Installation:
    """Gateways, tenants and the operator's loop."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.store = Store()
        self.client = Statuses(session, self.store)
        self.loop = TenantLoop(self.client, self.store, OperatorSettings(own_namespace="octavo-system"))
        self.gateways: list[GatewayServer] = []

    async def start_gateway(self, *, tenants: bool = True) -> GatewayServer:
        settings = GatewaySettings(host="127.0.0.1", port=0, metrics_port=0)
        server = GatewayServer(settings, Registry(), directory=build_from_cluster([], []) if tenants else None)
        await server.start()
        self.gateways.append(server)
        annotations = {ADDRESS_ANNOTATION: metrics_address(server).removeprefix("http://")}
        labels = {"app.kubernetes.io/component": "gateway"}
        name = f"gateway-{len(self.gateways)}"
        metadata = {"name": name, "namespace": "octavo-system", "labels": labels, "annotations": annotations}
        self.store.put(POD, {"metadata": metadata, "status": {"phase": "Running"}})
        return server

    async def look(self, *names: str) -> list[tuple[str, str, int]]:
        await self.loop.look(self.session)
        found = []
        for name in names:
            status = (self.store.get(INFERENCE_TENANT, None, name) or {})["status"]
            (ready,) = status["conditions"]
            found.append((ready["status"], ready["reason"], status["keys"]))
        return found


@pytest.fixture
async def installation() -> AsyncIterator[Installation]:
    async with aiohttp.ClientSession() as session:
        installation = Installation(session)
        yield installation
        for gateway in installation.gateways:
            await gateway.stop(0.0)


async def test_a_tenant_is_ready_once_every_gateway_has_its_keys(installation: Installation) -> None:
    first, second = await installation.start_gateway(), await installation.start_gateway()
    resource = tenant("acme", "acme-keys")
    installation.store.put(INFERENCE_TENANT, resource)
    assert await installation.look("acme") == [("Unknown", "Propagating", 0)]
    first.app.accounts.set_directory(build_from_cluster([resource], [secret("acme-keys", KEY)]))
    assert await installation.look("acme") == [("Unknown", "Propagating", 1)]
    second.app.accounts.set_directory(build_from_cluster([resource], [secret("acme-keys", KEY)]))
    assert await installation.look("acme") == [("True", "Enforced", 1)]
    written = installation.client.written
    await installation.look("acme")
    assert installation.client.written == written, "nothing is written when nothing changed"


async def test_a_missing_secret_and_a_key_of_two_tenants_are_named(installation: Installation) -> None:
    gateway = await installation.start_gateway()
    resources = [tenant("absent", "nowhere"), tenant("one", "one-keys"), tenant("two", "two-keys")]
    for resource in resources:
        installation.store.put(INFERENCE_TENANT, resource)
    secrets = [secret("one-keys", KEY, new_key()), secret("two-keys", KEY)]
    gateway.app.accounts.set_directory(build_from_cluster(resources, secrets))
    seen = await installation.look("absent", "one", "two")
    assert seen == [("False", "InvalidKeys", 0), ("False", "InvalidKeys", 1), ("False", "InvalidKeys", 0)]
    status = (installation.store.get(INFERENCE_TENANT, None, "absent") or {})["status"]
    assert "there is no Secret 'nowhere'" in status["conditions"][0]["message"]


async def test_a_gateway_that_lets_everybody_in_enforces_nobody(installation: Installation) -> None:
    await installation.start_gateway(tenants=False)
    installation.store.put(INFERENCE_TENANT, tenant("acme", "acme-keys"))
    assert await installation.look("acme") == [("False", "NotEnforced", 0)]


async def test_no_key_and_no_hash_is_told(installation: Installation) -> None:
    gateway = await installation.start_gateway()
    resource = tenant("acme", "acme-keys")
    gateway.app.accounts.set_directory(build_from_cluster([resource], [secret("acme-keys", KEY)]))
    async with installation.session.get(f"{metrics_address(gateway)}/tenants") as answer:
        page = await answer.text()
    assert "acme" in page
    assert KEY not in page
    assert hash_key(KEY).hex() not in page
