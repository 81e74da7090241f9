"""A namespace that serves: an operator, a gateway as a pod, kubectl, and a client that insists on whole answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import yaml

from e2e import control_plane
from e2e.cluster import POD, until
from e2e.control_plane import ControlPlane
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.run import Operator
from octavo_operator.controller.settings import OperatorSettings

SERVING_RUNTIME = Kind("serving.octavo.dev/v1alpha1", "ServingRuntime", "servingruntimes")
IMAGE = "localhost/octavo:e2e"  # this Python with octavo, where a node really runs containers
NEEDED = ("kube-controller-manager", "kube-scheduler", "kubectl")
START_S = 240.0  # to load a real model on a busy machine
QUESTION = [{"role": "user", "content": "Tell me a story about a lighthouse keeper and a whale."}]

SIMULATED = {
    "apiVersion": SERVING_RUNTIME.api_version,
    "kind": SERVING_RUNTIME.kind,
    "metadata": {"name": "simulated"},
    "spec": {
        "engine": "simulated",
        "supportedModelFormats": [{"name": "safetensors"}],
        "supports": {"cpu": True},
        "protocols": ["openai-v1"],
        "container": {
            "image": IMAGE,
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


def kubectl() -> str:
    """Where kubectl is."""
    return str(control_plane.program("kubectl"))


class Cluster:
    """One namespace with an operator of its own and a gateway at `url`."""

    def __init__(self, plane: ControlPlane, client: KubeClient, namespace: str, url: str) -> None:
        self.plane, self.client, self.namespace, self.url = plane, client, namespace, url

    def kubectl(self, *words: str, manifest: Any = None) -> str:
        """Run kubectl in the namespace, with a manifest on its standard input; fails with what it said."""
        done = subprocess.run(
            [kubectl(), "--kubeconfig", str(self.plane.kubeconfig), "-n", self.namespace, *words],
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


@contextlib.asynccontextmanager
async def serving(
    plane: ControlPlane, client: KubeClient, namespace: str, address: str = "127.0.0.1"
) -> AsyncIterator[Cluster]:
    """`address` is where pods reach this machine."""
    settings = OperatorSettings(
        namespaces=(namespace,), own_namespace=namespace, scaling_interval_s=1.0, engine_image=IMAGE
    )
    operator = Operator(settings)
    operator.start()
    try:
        assert await asyncio.to_thread(operator.ready.wait, 20), "kopf did not become ready"
        async with _proxy(plane, address) as api:
            url = await _gateway(client, namespace, api)
            yield Cluster(plane, client, namespace, url)
            for service in (await client.list_objects(INFERENCE_SERVICE, namespace))["items"]:
                await client.delete(INFERENCE_SERVICE, namespace, service["metadata"]["name"])
            await client.delete(POD, namespace, "gateway")
            await until(lambda: _is_empty(client, namespace), "every pod is gone", START_S)
    finally:
        operator.stop()


@contextlib.asynccontextmanager
async def _proxy(plane: ControlPlane, address: str) -> AsyncIterator[str]:
    """The API server without credentials, as `kubectl proxy` offers it."""
    flags = ["--kubeconfig", str(plane.kubeconfig), f"--address={address}", "--accept-hosts=.*", "--port=0"]
    process = await asyncio.create_subprocess_exec(kubectl(), "proxy", *flags, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        yield f"http://{line.split()[-1]}"
    finally:
        process.terminate()
        await process.wait()


async def _gateway(client: KubeClient, namespace: str, api: str) -> str:
    """A gateway as a pod; returns its address."""
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
                    "image": IMAGE,
                    "command": ["octavo", "gateway", *flags],
                    "startupProbe": {
                        "httpGet": {"path": "/health/ready", "port": 8080},
                        "periodSeconds": 1,
                        "failureThreshold": 120,
                    },
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
