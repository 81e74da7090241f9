"""A canary rollout by a real Deployment controller: two Deployments whose selectors overlap never touch each other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from e2e import control_plane
from e2e.cluster import EVENT, manifest, reaches, until
from e2e.control_plane import ControlPlane, FakeNode
from octavo_gateway.discovery import ApiServer
from octavo_gateway.discovery.kubernetes import KubernetesDiscovery
from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.kinds import CONTROLLER_REVISION, DEPLOYMENT, INFERENCE_SERVICE, POD, Kind
from octavo_operator.controller.replicas import ADDRESS_ANNOTATION
from octavo_operator.controller.run import Operator

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(control_plane.missing_reason()), reason=control_plane.missing_reason()),
]

REPLICA_SET = Kind("apps/v1", "ReplicaSet", "replicasets")
CANARY = {"steps": [{"weight": 34, "pauseSeconds": 3}, {"weight": 50, "pauseSeconds": 2}]}


def trial(namespace: str, seed: int, **rollout: Any) -> dict[str, Any]:
    wish = manifest(namespace, replicas=3, rollout={"canary": CANARY, **rollout}, engine={"seed": seed})
    wish["spec"].pop("autoscaling", None)
    return wish


async def edit(client: KubeClient, namespace: str, seed: int) -> None:
    await client.patch(INFERENCE_SERVICE, namespace, "smollm2", {"spec": {"engine": {"seed": seed}}})


async def replicas(client: KubeClient, namespace: str) -> dict[str, int]:
    found = await client.list_objects(DEPLOYMENT, namespace)
    return {d["metadata"]["name"]: d["spec"]["replicas"] for d in found["items"]}


async def seeds(client: KubeClient, namespace: str) -> list[str]:
    """The seed of every engine, as its command says."""
    found = []
    for pod in (await client.list_objects(POD, namespace))["items"]:
        command = pod["spec"]["containers"][0].get("command", ["gateway"])
        found.append(command[command.index("--seed") + 1] if "--seed" in command else "gateway")
    return sorted(found)


async def events(client: KubeClient, namespace: str) -> list[str]:
    found = (await client.list_objects(EVENT, namespace))["items"]
    return [e["reason"] for e in found if e["reason"].startswith("Canary")]


@pytest.fixture
async def serving(client: KubeClient, namespace: str, operator: Operator, plane: ControlPlane) -> str:
    if not plane.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager: no pods are made")
    await client.create(INFERENCE_SERVICE, trial(namespace, 1))

    async def ready() -> bool:
        service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
        return bool((service.get("status") or {}).get("readyReplicas") == 3)

    await until(ready, "three replicas are ready")
    return namespace


async def test_a_healthy_revision_gets_its_replicas_step_by_step_and_takes_over(
    client: KubeClient, serving: str
) -> None:
    before = {s["metadata"]["name"] for s in (await client.list_objects(REPLICA_SET, serving))["items"]}
    await edit(client, serving, 2)

    async def on_trial() -> bool:
        return await replicas(client, serving) == {"smollm2": 2, "smollm2-canary": 2} and await seeds(
            client, serving
        ) == ["1", "1", "2", "2"]

    await until(on_trial, "both revisions have their part")
    (kept,) = (await client.list_objects(CONTROLLER_REVISION, serving))["items"]
    assert kept["metadata"]["ownerReferences"][0]["kind"] == "InferenceService"
    sets = (await client.list_objects(REPLICA_SET, serving))["items"]
    (old,) = (s for s in sets if s["metadata"]["name"] in before)
    assert old["spec"]["replicas"] == 2, "the revision that serves kept its very ReplicaSet"

    async def taken_over() -> bool:
        return await replicas(client, serving) == {"smollm2": 3} and await seeds(client, serving) == ["2", "2", "2"]

    await until(taken_over, "the new revision has taken over")
    await reaches(client, serving, "Progressing", "False", "Complete")
    assert set(await events(client, serving)) == {"CanaryStarted", "CanaryStep", "CanaryPromoting", "CanaryPromoted"}
    assert (await client.list_objects(CONTROLLER_REVISION, serving))["items"] == []


async def test_a_revision_that_crashes_is_taken_back_without_touching_what_serves(
    client: KubeClient, serving: str, node: FakeNode
) -> None:
    pods = {p["metadata"]["uid"] for p in (await client.list_objects(POD, serving))["items"]}
    ended = {"exitCode": 1, "reason": "Error", "message": "boom", "startedAt": None, "finishedAt": None}
    state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    status = {"name": "engine", "image": "x", "imageID": "", "ready": False, "started": False, "restartCount": 2}
    broken = {**status, "state": state, "lastState": {"terminated": ended}}
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]
    node.canary_faults["smollm2"] = {"phase": "Running", "containerStatuses": [broken], "conditions": conditions}
    try:
        await edit(client, serving, 2)
        await reaches(client, serving, "Degraded", "True", "CanaryRolledBack")
    finally:
        node.canary_faults.pop("smollm2")

    async def undone() -> bool:
        return await replicas(client, serving) == {"smollm2": 3} and await seeds(client, serving) == ["1", "1", "1"]

    await until(undone, "the revision on trial is gone")
    left = {p["metadata"]["uid"] for p in (await client.list_objects(POD, serving))["items"]}
    assert pods == left, "no pod that served was replaced"
    await reaches(client, serving, "Ready", "True")
    await edit(client, serving, 1)
    await reaches(client, serving, "Progressing", "False", "Complete")


class Replica:
    """An engine over HTTP that answers with this status, and counts."""

    def __init__(self, status: int) -> None:
        self.status, self.asked = status, 0
        self.address = ""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _complete(self, request: web.Request) -> web.Response:
        await request.read()
        self.asked += 1
        return web.json_response({"choices": [{"text": "x"}]}, status=self.status)


@contextlib.asynccontextmanager
async def gateway_beside(client: KubeClient, plane: ControlPlane, namespace: str) -> AsyncIterator[str]:
    """A real gateway that discovers models from the API server, known to the operator as a pod; its address."""
    program = str(control_plane.program("kubectl"))
    proxy = await asyncio.create_subprocess_exec(
        program, "--kubeconfig", str(plane.kubeconfig), "proxy", "--port=0", stdout=asyncio.subprocess.PIPE
    )
    assert proxy.stdout is not None
    api = ApiServer(f"http://{(await proxy.stdout.readline()).decode().split()[-1]}")
    registry = Registry()
    server = GatewayServer(GatewaySettings(host="127.0.0.1", port=0, metrics_port=0), registry)
    await server.start()
    following = asyncio.create_task(KubernetesDiscovery(api, registry, namespace=namespace).run())
    assert server.listeners is not None
    assert server.listeners.metrics_address is not None
    annotations = {ADDRESS_ANNOTATION: server.listeners.metrics_address.removeprefix("http://")}
    labels = {"app.kubernetes.io/component": "gateway", "app.kubernetes.io/part-of": "octavo"}
    metadata = {"name": "gateway", "namespace": namespace, "labels": labels, "annotations": annotations}
    spec = {"containers": [{"name": "gateway", "image": "gateway"}]}
    await client.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    try:
        yield server.address
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await server.stop(0.0)
        proxy.terminate()
        await proxy.wait()


@pytest.mark.skipif(
    bool(control_plane.missing_reason("kubectl")), reason=control_plane.missing_reason("kubectl") or "kubectl is there"
)
async def test_requests_that_a_new_revision_fails_take_it_back_and_clients_get_well(
    client: KubeClient, namespace: str, operator: Operator, node: FakeNode, plane: ControlPlane
) -> None:
    """The whole circle: route and labels tell the gateway the share, its page tells the operator the failures."""
    old, new = Replica(200), Replica(500)
    runners = [await old.start(), await new.start()]
    node.annotations["smollm2"] = {ADDRESS_ANNOTATION: old.address}
    node.canary_annotations["smollm2"] = {ADDRESS_ANNOTATION: new.address}
    patient = {"canary": {"steps": [{"weight": 34, "pauseSeconds": 600}]}}
    try:
        async with gateway_beside(client, plane, namespace) as url, aiohttp.ClientSession() as http:
            await client.create(INFERENCE_SERVICE, {**trial(namespace, 1, **patient)})

            async def ask() -> int:
                body = {"model": "smollm2", "prompt": "x"}
                async with http.post(f"{url}/v1/completions", json=body) as answer:
                    return answer.status

            async def served() -> bool:
                return await ask() == 200

            await until(served, "the gateway serves the model")
            await reaches(client, namespace, "RouteReady", "True", "Published")
            await edit(client, namespace, 2)
            before = old.asked

            async def taken_back() -> bool:
                await ask()
                service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
                return ((service.get("status") or {}).get("canary") or {}).get("phase") == "RolledBack"

            await until(taken_back, "the failing revision is taken back", 60.0)
            service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
            assert "requests failed; analysis.maxErrorRate is 1.0%" in service["status"]["canary"]["message"]
            assert 0 < new.asked <= 0.34 * (new.asked + old.asked - before) + 1, "never more than its share"

            async def alone() -> bool:
                return await replicas(client, namespace) == {"smollm2": 3} and len(await seeds(client, namespace)) == 4

            await until(alone, "the revision on trial is gone")
            assert [await ask() for _ in range(30)] == [200] * 30
            assert "CanaryRolledBack" in await events(client, namespace)
    finally:
        node.annotations.pop("smollm2")
        node.canary_annotations.pop("smollm2")
        for runner in runners:
            await runner.cleanup()
