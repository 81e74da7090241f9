"""From `kubectl apply` to tokens and back to nothing: real API server, controllers and kubectl, the operator, the
gateway, and engines as processes of a node that is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from e2e import control_plane
from e2e.cluster import POD, SMOLLM2, reaches, until
from e2e.control_plane import ControlPlane
from e2e.process_node import ProcessNode
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.kinds import DEPLOYMENT, INFERENCE_SERVICE
from octavo_operator.controller.run import Operator
from octavo_operator.controller.settings import OperatorSettings

MISSING = control_plane.missing_reason("kube-controller-manager", "kube-scheduler", "kubectl")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
SERVING_RUNTIME = Kind("serving.octavo.dev/v1alpha1", "ServingRuntime", "servingruntimes")
KUBECTL = "" if MISSING else str(control_plane.program("kubectl"))
START_S = 240.0  # to load a real model on a busy machine
QUESTION = [{"role": "user", "content": "Tell me a story about a lighthouse keeper and a whale."}]


@pytest.fixture(scope="module")
def node(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessNode]:
    node = ProcessNode(plane, tmp_path_factory.mktemp("pods"))
    node.start()
    yield node
    node.stop()


class Cluster:
    """One namespace with an operator of its own and a gateway at `url`."""

    def __init__(self, plane: ControlPlane, client: KubeClient, namespace: str, url: str) -> None:
        self.plane, self.client, self.namespace, self.url = plane, client, namespace, url

    def kubectl(self, *words: str, manifest: Any = None) -> str:
        """Run kubectl in the namespace, with a manifest on its standard input; fails with what it said."""
        done = subprocess.run(
            [KUBECTL, "--kubeconfig", str(self.plane.kubeconfig), "-n", self.namespace, *words],
            input=yaml.safe_dump_all(manifest) if manifest else None,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def pods(self) -> list[dict[str, Any]]:
        found = (await self.client.list_objects(POD, self.namespace))["items"]
        return [p for p in found if p["metadata"]["labels"].get("app.kubernetes.io/component") == "engine"]

    async def status(self, name: str) -> dict[str, Any]:
        service = await self.client.get(INFERENCE_SERVICE, self.namespace, name)
        found: dict[str, Any] = service.get("status") or {}
        return found

    async def knows(self, http: aiohttp.ClientSession, model: str) -> bool:
        async with http.get(f"{self.url}/v1/models") as answer:
            return model in [entry["id"] for entry in (await answer.json())["data"]]

    async def stream(self, http: aiohttp.ClientSession, model: str, max_tokens: int) -> str:
        """One streamed answer; fails unless it began with 200 and ended with a finish_reason and [DONE]."""
        body = {"model": model, "messages": QUESTION, "max_tokens": max_tokens, "stream": True, "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        async with http.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-3:]
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        assert [c["finish_reason"] for c in choices if c.get("finish_reason")] == ["length"], events[-3:]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.fixture
async def cluster(plane: ControlPlane, client: KubeClient, namespace: str, node: ProcessNode) -> AsyncIterator[Cluster]:
    settings = OperatorSettings(namespaces=(namespace,), own_namespace=namespace, scaling_interval_s=1.0)
    operator = Operator(settings)
    operator.start()
    assert operator.ready.wait(20), "kopf did not become ready"
    try:
        async with _proxy(plane) as api:
            url = await _gateway(client, namespace, api)
            yield Cluster(plane, client, namespace, url)
            for service in (await client.list_objects(INFERENCE_SERVICE, namespace))["items"]:
                await client.delete(INFERENCE_SERVICE, namespace, service["metadata"]["name"])
            await client.delete(POD, namespace, "gateway")
            await until(lambda: _is_empty(client, namespace), "every pod is gone", START_S)
    finally:
        operator.stop()


@contextlib.asynccontextmanager
async def _proxy(plane: ControlPlane) -> AsyncIterator[str]:
    """The API server without credentials, as `kubectl proxy` offers it."""
    process = await asyncio.create_subprocess_exec(
        KUBECTL, "--kubeconfig", str(plane.kubeconfig), "proxy", "--port=0", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        yield f"http://{line.split()[-1]}"
    finally:
        process.terminate()
        await process.wait()


async def _gateway(client: KubeClient, namespace: str, api: str) -> str:
    """A gateway as a pod of the process node; returns its address."""
    flags = ["--kubernetes-api", api, "--namespace", namespace, "--host", "0.0.0.0", "--metrics-port", "9090"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "gateway",
            "namespace": namespace,
            "labels": {"app.kubernetes.io/component": "gateway", "app.kubernetes.io/part-of": "octavo"},
        },
        "spec": {
            "containers": [
                {
                    "name": "gateway",
                    "image": "octavo-gateway",
                    "command": ["octavo", "gateway", *flags],
                    "startupProbe": {"httpGet": {"path": "/health/ready", "port": 8080}, "periodSeconds": 1},
                }
            ]
        },
    }
    await client.create(POD, pod)

    async def address() -> str:
        status = (await client.get(POD, namespace, "gateway"))["status"]
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])
        return f"http://{status['podIP']}:8080" if ready else ""

    url: str = await until(address, "the gateway is ready", 60)
    return url


async def _is_empty(client: KubeClient, namespace: str) -> bool:
    return not (await client.list_objects(POD, namespace))["items"]


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


SIMULATED = {
    "apiVersion": SERVING_RUNTIME.api_version,
    "kind": SERVING_RUNTIME.kind,
    "metadata": {"name": "simulated"},
    "spec": {
        "engine": "octavo",
        "supportedModelFormats": [{"name": "safetensors"}],
        "supports": {"cpu": True},
        "protocols": ["openai-v1"],
        "container": {
            "image": "octavo-simulated",
            "command": ["python", "-m", "fakes.fake_replica"],
            "args": [
                json.dumps({"step_s": 0.1}),
                '{"host": "$(HOST)", "port": $(PORT), "served_model_names": ["$(MODEL_NAME)"], '
                '"drain_propagation": 3, "drain_timeout": 60}',
            ],
            "flags": [{"field": "engine.seed", "values": {"1": "", "2": ""}}],
        },
        "port": 8000,
        "probes": {
            "startup": {"path": "/health/ready", "periodSeconds": 1},
            "readiness": {"path": "/health/ready", "periodSeconds": 1, "failureThreshold": 2},
            "liveness": {"path": "/health/live", "periodSeconds": 10},
        },
        "drain": {"method": "Sigterm"},
    },
}


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
