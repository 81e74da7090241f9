"""From `kubectl apply` to tokens and back to nothing: real API server, controllers and kubectl, the operator, the
gateway, and engines as processes of a node that is none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from e2e import control_plane
from e2e.cluster import SMOLLM2, reaches, until
from e2e.control_plane import ControlPlane
from e2e.process_node import ProcessNode
from e2e.serving import NEEDED, SIMULATED, START_S, Cluster, serving
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.kinds import DEPLOYMENT, INFERENCE_SERVICE

MISSING = control_plane.missing_reason(*NEEDED)
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


@pytest.fixture(scope="module")
def node(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessNode]:
    node = ProcessNode(plane, tmp_path_factory.mktemp("pods"))
    node.start()
    yield node
    node.stop()


@pytest.fixture
async def cluster(plane: ControlPlane, client: KubeClient, namespace: str, node: ProcessNode) -> AsyncIterator[Cluster]:
    async with serving(plane, client, namespace) as cluster:
        yield cluster


async def test_a_service_lives_from_apply_to_tokens_to_zero_and_back(cluster: Cluster, smollm2_gguf: Path) -> None:
    spec = {
        **SMOLLM2["spec"],
        "model": {**SMOLLM2["spec"]["model"], "maxModelLen": 1024},
        "engine": {"maxNumSeqs": 2, "kvCacheMemory": "128Mi", "numThreads": 1},
        "resources": {"limits": {"cpu": "1", "memory": "2Gi"}},
        "autoscaling": {
            "minReplicas": 0,
            "maxReplicas": 2,
            "metrics": [{"type": "QueueDepth", "target": "1"}, {"type": "Concurrency", "target": "2"}],
            "scaleToZero": {"idleSeconds": 60},
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}},
        },
        "drain": {"propagationSeconds": 2, "timeoutSeconds": 60},
    }
    cluster.kubectl("apply", "-f", "-", manifest=[{**SMOLLM2, "spec": spec}])
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=START_S))
    async with http:
        await until(lambda: cluster.knows(http, "smollm2"), "the gateway knows the model")
        # The first request finds no replica ready, and is held until one is.
        text = await cluster.stream(http, "smollm2", 16)
        assert len(text) > 20
        cluster.kubectl("wait", "--for=condition=Ready", "oisvc/smollm2", "--timeout=30s")

        async def replicas(count: int) -> bool:
            deployment = await cluster.client.get(DEPLOYMENT, cluster.namespace, "smollm2")
            return int((deployment.get("status") or {}).get("readyReplicas") or 0) == count

        # Load that one replica cannot carry brings a second.
        load = [asyncio.create_task(cluster.stream(http, "smollm2", 64)) for _ in range(8)]
        await until(lambda: replicas(2), "two replicas serve", START_S)
        history = (await cluster.status("smollm2"))["scaling"]["history"]
        assert (history[0]["from"], history[0]["to"]) == (1, 2)

        # A rolling update with streams open.
        before = {pod["metadata"]["name"] for pod in await cluster.pods()}
        load += [asyncio.create_task(cluster.stream(http, "smollm2", 32)) for _ in range(4)]
        change = {"spec": {"engine": {"maxNumSeqs": 3}}}
        cluster.kubectl("patch", "oisvc", "smollm2", "--type=merge", "-p", json.dumps(change))

        async def rolled() -> bool:
            now = {pod["metadata"]["name"] for pod in await cluster.pods()}
            return bool(now) and not now & before

        await until(rolled, "every old replica is gone", START_S)
        assert len(set(await asyncio.gather(*load[:8]))) == 1
        await asyncio.gather(*load[8:])

        # Nobody asks: nothing runs, and that is no fault.
        await reaches(cluster.client, cluster.namespace, "Ready", "True", "ScaledToZero", START_S)

        async def asleep() -> bool:
            return not await cluster.pods()

        await until(asleep, "no replica runs", START_S)
        assert await cluster.stream(http, "smollm2", 16) == text


async def test_a_rollout_with_200_streams_open_loses_no_request(cluster: Cluster) -> None:
    """Three replicas are replaced and a fourth scaled away while requests keep coming; every stream ends in order."""
    service = {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.kind,
        "metadata": {"name": "sim"},
        "spec": {
            "runtime": {"name": "simulated", "kind": "ServingRuntime"},
            "model": {"storageUri": "hf://simulated/model"},
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
            "replicas": 3,
            "drain": {"propagationSeconds": 3, "timeoutSeconds": 60},
            "routing": {"strategy": "LeastLoaded"},
        },
    }
    cluster.kubectl("apply", "-f", "-", manifest=[SIMULATED, service])
    cluster.kubectl("wait", "--for=condition=Ready", "oisvc/sim", "--timeout=120s")
    await until(lambda: _all_ready(cluster, 3), "three replicas serve", 120)
    before = {pod["metadata"]["name"] for pod in await cluster.pods()}
    streams: list[asyncio.Task[str]] = []
    ending = asyncio.Event()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as http:

        async def arrivals() -> None:
            while not ending.is_set():
                streams.append(asyncio.create_task(cluster.stream(http, "sim", 80)))
                await asyncio.sleep(0.04)

        arriving = asyncio.create_task(arrivals())
        await until(lambda: _counts(streams, 200), "200 streams are open", 60)
        environment = [{"name": "REVISION", "value": "2"}]
        patch = {"spec": {"engine": {"env": environment}}}
        cluster.kubectl("patch", "oisvc", "sim", "--type=merge", "-p", json.dumps(patch))

        async def rolled() -> bool:
            now = {pod["metadata"]["name"] for pod in await cluster.pods()}
            return len(now) == 3 and not now & before

        await until(rolled, "every old replica is gone", 300)
        cluster.kubectl("patch", "oisvc", "sim", "--type=merge", "-p", '{"spec": {"replicas": 2}}')
        await until(lambda: _all_ready(cluster, 2), "one replica fewer", 120)
        ending.set()
        await arriving
        texts = await asyncio.gather(*streams, return_exceptions=True)
    lost = [text for text in texts if isinstance(text, BaseException)]
    assert len(texts) > 400
    assert not lost, f"{len(lost)} of {len(texts)} streams were lost, the first: {lost[0]!r}"


async def _all_ready(cluster: Cluster, count: int) -> bool:
    status = await cluster.status("sim")
    return bool(status.get("readyReplicas") == count and len(await cluster.pods()) == count)


async def _counts(streams: list[asyncio.Task[str]], count: int) -> bool:
    return sum(not stream.done() for stream in streams) >= count
