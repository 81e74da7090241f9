"""Replicas that span nodes, by real StatefulSet controllers: made, replaced by groups, made anew when torn."""

from __future__ import annotations

from typing import Any

import pytest

from e2e import control_plane
from e2e.cluster import manifest, reaches, until
from e2e.control_plane import ControlPlane, FakeNode
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.kinds import INFERENCE_SERVICE, POD, STATEFUL_SET
from octavo_operator.controller.run import Operator

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(control_plane.missing_reason()), reason=control_plane.missing_reason()),
]


def spanning(namespace: str, **spec: Any) -> dict[str, Any]:
    wish = manifest(namespace, runtime={"name": "vllm"}, model={"storageUri": "hf://org/model"}, replicas=1, **spec)
    wish["spec"]["resources"] = {"limits": {"nvidia.com/gpu": 1}}
    wish["spec"]["parallelism"] = {"tensor": 2}
    wish["spec"]["drain"] = {"propagationSeconds": 0, "timeoutSeconds": 5}
    for name in ("autoscaling", "engine"):
        wish["spec"].pop(name, None)
    return wish


async def pods(client: KubeClient, namespace: str) -> dict[str, str]:
    """Pods by name, with their uid."""
    found = (await client.list_objects(POD, namespace))["items"]
    return {p["metadata"]["name"]: p["metadata"]["uid"] for p in found if not p["metadata"].get("deletionTimestamp")}


@pytest.fixture
async def serving(client: KubeClient, namespace: str, operator: Operator, plane: ControlPlane) -> str:
    if not plane.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager: no pods are made")
    await client.create(INFERENCE_SERVICE, spanning(namespace))
    await reaches(client, namespace, "Ready", "True", "MinimumReplicasAvailable")
    return namespace


async def test_a_group_is_one_replica_and_a_new_spec_replaces_all_of_its_nodes(
    client: KubeClient, serving: str
) -> None:
    before = await pods(client, serving)
    assert sorted(before) == ["smollm2-g0-0", "smollm2-g0-w-1"]
    service = await client.get(INFERENCE_SERVICE, serving, "smollm2")
    assert (service["status"]["replicas"], service["status"]["readyReplicas"]) == (1, 1)
    worker = await client.get(POD, serving, "smollm2-g0-w-1")
    assert worker["metadata"]["labels"]["apps.kubernetes.io/pod-index"] == "1", "its rank in the environment"
    await client.patch(INFERENCE_SERVICE, serving, "smollm2", {"spec": {"engine": {"seed": 7}}})

    async def replaced() -> bool:
        after = await pods(client, serving)
        return sorted(after) == sorted(before) and not set(after.values()) & set(before.values())

    await until(replaced, "both nodes are new")
    await reaches(client, serving, "Progressing", "False", "Complete")
    await client.patch(INFERENCE_SERVICE, serving, "smollm2", {"spec": {"replicas": 0}})

    async def gone() -> bool:
        return not (await client.list_objects(STATEFUL_SET, serving))["items"] and not await pods(client, serving)

    await until(gone, "its sets and pods are gone")


async def test_when_one_node_restarts_and_the_replica_stays_away_the_whole_group_is_made_anew(
    client: KubeClient, serving: str, node: FakeNode
) -> None:
    before = await pods(client, serving)
    status = {"name": "engine", "image": "x", "imageID": "", "ready": False, "started": True, "restartCount": 1}
    running = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]
    torn = {"phase": "Running", "containerStatuses": [{**status, **running}], "conditions": conditions}
    node.pod_faults[before["smollm2-g0-0"]] = torn
    await reaches(client, serving, "Ready", "False")

    async def replaced() -> bool:
        after = await pods(client, serving)
        return sorted(after) == sorted(before) and not set(after.values()) & set(before.values())

    await until(replaced, "both nodes are new")
    await reaches(client, serving, "Ready", "True")
