"""On a real kubelet: engines in containers serve, drain and are replaced; what it reports becomes a condition."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e import control_plane, real_node
from e2e.cluster import SMOLLM2, install_crds, reaches, until
from e2e.control_plane import ControlPlane
from e2e.real_node import NODE_ADDRESS, RealNode, own_network
from e2e.serving import NEEDED, SIMULATED, START_S, Cluster, serving
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.kinds import INFERENCE_SERVICE

MISSING = control_plane.missing_reason(*NEEDED) or real_node.missing_reason()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
FAULT_S = 120.0


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with own_network():
        root = tmp_path_factory.mktemp("control-plane")
        plane = control_plane.start(root, lambda started: asyncio.run(install_crds(started)), NODE_ADDRESS)
        yield plane
        plane.stop()


@pytest.fixture(scope="module")
def node(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    folder = tmp_path_factory.mktemp("node")
    node = RealNode(plane, folder)
    try:
        node.start(real_node.make_image(folder))
        yield node
    finally:
        node.stop()
        real_node.remove(folder)


@pytest.fixture
async def cluster(plane: ControlPlane, client: KubeClient, namespace: str, node: RealNode) -> AsyncIterator[Cluster]:
    async with serving(plane, client, namespace, NODE_ADDRESS) as cluster:
        yield cluster


def volume(namespace: str, folder: Path) -> list[dict[str, Any]]:
    """A claim of the namespace, bound to a folder of the node."""
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": namespace},
            "spec": {**common, "capacity": {"storage": "1Gi"}, "hostPath": {"path": str(folder)},
                     "claimRef": {"name": "models", "namespace": namespace}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models"},
            "spec": {**common, "volumeName": namespace, "resources": {"requests": {"storage": "1Gi"}}},
        },
    ]  # fmt: skip


async def test_a_real_engine_serves_and_is_replaced_with_a_stream_open(
    cluster: Cluster, tmp_path: Path, smollm2_gguf: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    os.link(smollm2_gguf, models / "model.gguf")
    for folder in (models, *models.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    spec = {
        **SMOLLM2["spec"],
        "model": {**SMOLLM2["spec"]["model"], "storageUri": "pvc://models/model.gguf", "maxModelLen": 1024},
        "engine": {"maxNumSeqs": 4, "kvCacheMemory": "128Mi", "numThreads": 1},
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}},
        "drain": {"propagationSeconds": 3, "timeoutSeconds": 100},
    }
    spec.pop("autoscaling")
    cluster.kubectl("apply", "-f", "-", manifest=[*volume(cluster.namespace, models), {**SMOLLM2, "spec": spec}])
    cluster.kubectl("wait", "--for=condition=Ready", "oisvc/smollm2", f"--timeout={START_S:.0f}s")
    (before,) = await cluster.pods()
    assert before["status"]["containerStatuses"][0]["restartCount"] == 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=START_S)) as http:
        await until(lambda: cluster.knows(http, "smollm2"), "the gateway knows the model")
        lone = await cluster.stream(http, "smollm2", 48)
        open_streams = [asyncio.create_task(cluster.stream(http, "smollm2", 48)) for _ in range(4)]
        await asyncio.sleep(1)
        cluster.kubectl("patch", "oisvc", "smollm2", "--type=merge", "-p", '{"spec": {"engine": {"maxNumSeqs": 5}}}')
        assert set(await asyncio.gather(*open_streams)) == {lone}

        async def replaced() -> bool:
            names = [pod["metadata"]["name"] for pod in await cluster.pods()]
            return len(names) == 1 and names != [before["metadata"]["name"]]

        await until(replaced, "a new replica alone serves", START_S)
        assert await cluster.stream(http, "smollm2", 48) == lone


def simulated(name: str, **container: Any) -> dict[str, Any]:
    """A runtime like the simulated one whose container differs."""
    runtime = copy.deepcopy(SIMULATED)
    runtime["metadata"] = {"name": name}
    runtime["spec"]["container"] |= container
    return runtime


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.kind,
        "metadata": {"name": name},
        "spec": {
            "runtime": {"name": name, "kind": "ServingRuntime"},
            "model": {"storageUri": "hf://simulated/model"},
            "resources": {"requests": {"cpu": "10m"}, "limits": {"cpu": "1", "memory": "512Mi"}},
            "replicas": 1,
            "drain": {"propagationSeconds": 1, "timeoutSeconds": 5},
            **spec,
        },
    }


def says(text: str) -> dict[str, Any]:
    """A container that prints a last line and fails."""
    return {"command": ["python", "-c", f"raise SystemExit({text!r})"], "args": []}


UNSET = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # name: what is wrong with the container, with the service, the reason, and words of the message
    "image": ({"image": "127.0.0.1:9/absent:1"}, {}, "ImagePullFailed", "pull secret"),
    "memory": ({"command": ["python", "-c", "bytearray(1 << 30)"], "args": []}, {}, "OOMKilled", "limits.memory"),
    "crash": (says("ValueError: boom"), {}, "CrashLoop", "ValueError: boom"),
    "hub": (says("ModelLoadError: hf://org/model: 404 Not Found"), {}, "ModelNotFound", "storageUri"),
    "secret": ({}, {"engine": {"env": [UNSET]}}, "ContainerConfigError", 'secret "hub" not found'),
}


async def test_what_a_kubelet_reports_becomes_a_condition_with_the_next_step_and_clears(
    cluster: Cluster, client: KubeClient
) -> None:
    """All faults at once, each in a service of its own; then all are repaired."""
    ill: list[dict[str, Any]] = []
    for name, (container, spec, _, _) in FAULTS.items():
        ill += [simulated(name, **container), service(name, **spec)]
    cluster.kubectl("apply", "-f", "-", manifest=ill)
    for name, (_, _, reason, words) in FAULTS.items():
        seen = await reaches(client, cluster.namespace, "Ready", "False", reason, FAULT_S, name)
        assert words in seen["message"]
        events = json.loads(cluster.kubectl("get", "events", "-o", "json"))["items"]
        assert any(e["reason"] == reason and e["regarding"]["name"] == name for e in map(_regarding, events))
    well = [obj for name in FAULTS for obj in (simulated(name), service(name))]
    cluster.kubectl("apply", "-f", "-", manifest=well)
    for name in FAULTS:
        await reaches(client, cluster.namespace, "Ready", "True", "MinimumReplicasAvailable", FAULT_S, name)
        await reaches(client, cluster.namespace, "ModelReady", "True", "Loaded", FAULT_S, name)


def _regarding(event: dict[str, Any]) -> dict[str, Any]:
    """core/v1 and events.k8s.io name the object differently."""
    return {**event, "regarding": event.get("regarding") or event["involvedObject"]}


async def test_an_engine_that_hangs_is_restarted_by_its_liveness_probe(cluster: Cluster, client: KubeClient) -> None:
    cluster.kubectl("apply", "-f", "-", manifest=[simulated("hang"), service("hang")])
    await reaches(client, cluster.namespace, "Ready", "True", "MinimumReplicasAvailable", FAULT_S, "hang")
    (pod,) = await cluster.pods()
    for process in _processes(pod["metadata"]["uid"], "fakes.fake_replica"):
        os.kill(process, signal.SIGSTOP)
    await reaches(client, cluster.namespace, "Ready", "False", "", FAULT_S, "hang")

    async def restarted() -> bool:
        (pod,) = await cluster.pods()
        return bool(pod["status"]["containerStatuses"][0]["restartCount"] >= 1)

    await until(restarted, "the kubelet restarts the engine", FAULT_S)
    await reaches(client, cluster.namespace, "Ready", "True", "MinimumReplicasAvailable", FAULT_S, "hang")


def _processes(pod_uid: str, word: str) -> list[int]:
    """Processes of a pod by a word of their command line."""
    found = subprocess.run(["pgrep", "-f", word], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if pod_uid in Path(f"/proc/{pid}/cgroup").read_text()]
