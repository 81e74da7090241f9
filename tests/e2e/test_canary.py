"""A canary rollout by a real Deployment controller: two Deployments whose selectors overlap never touch each other."""

from __future__ import annotations

from typing import Any

import pytest

from e2e import control_plane
from e2e.cluster import EVENT, manifest, reaches, until
from e2e.control_plane import ControlPlane, FakeNode
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.kinds import CONTROLLER_REVISION, DEPLOYMENT, INFERENCE_SERVICE, POD, Kind
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
    """The seed of every pod, as its command says."""
    found = []
    for pod in (await client.list_objects(POD, namespace))["items"]:
        command = pod["spec"]["containers"][0]["command"]
        found.append(command[command.index("--seed") + 1])
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
