"""A control plane for each file of tests, and a namespace for each test."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import control_plane
from e2e.cluster import NAMESPACE, install_crds, run_operator
from e2e.control_plane import ControlPlane, FakeNode
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.run import Operator


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    root = tmp_path_factory.mktemp("control-plane")
    plane = control_plane.start(root, lambda started: asyncio.run(install_crds(started)))
    yield plane
    plane.stop()


@pytest.fixture(scope="module")
def node(plane: ControlPlane) -> Iterator[FakeNode]:
    node = FakeNode(plane)
    node.start()
    yield node
    node.stop()


@pytest.fixture
async def client(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig))
    client = control_plane.connect(plane)
    yield client
    await client.close()


@pytest.fixture
async def namespace(client: KubeClient) -> str:
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    await client.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture
def operator(client: KubeClient, namespace: str, node: FakeNode) -> Iterator[Operator]:
    operator = run_operator(namespace)
    yield operator
    operator.stop()
