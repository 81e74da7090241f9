"""The real kopf operator against a real API server: apply, scale, drift, restart, faults, delete."""

from __future__ import annotations

import asyncio
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e2e import control_plane
from e2e.cluster import (
    EVENT,
    NAMESPACE,
    PDB,
    POD,
    SERVICE,
    SMOLLM2,
    WAIT_S,
    condition,
    is_gone,
    manifest,
    reaches,
    run_operator,
    until,
)
from e2e.control_plane import ControlPlane, FakeNode
from octavo_operator.controller.client import ApiError, Kind, KubeClient
from octavo_operator.controller.kinds import DEPLOYMENT, INFERENCE_SERVICE, MODEL_CACHE
from octavo_operator.controller.leader import LeaderElection
from octavo_operator.controller.run import Operator
from octavo_operator.controller.settings import OperatorSettings

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(control_plane.missing_reason()), reason=control_plane.missing_reason()),
]


async def test_applying_the_example_yields_deployment_service_and_honest_status(
    client: KubeClient, namespace: str, operator: Operator, plane: ControlPlane
) -> None:
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    deployment = await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["command"][:2] == ["octavo", "serve"]
    await until(lambda: client.get(SERVICE, namespace, "smollm2"), "the Service exists")
    if not plane.has_controllers:
        assert (await reaches(client, namespace, "Ready", "False"))["reason"] == "ReplicasNotReady"
        return
    await reaches(client, namespace, "Ready", "True", "MinimumReplicasAvailable")
    service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
    assert service["status"]["readyReplicas"] == 1
    assert service["status"]["observedGeneration"] == service["metadata"]["generation"]
    assert "finalizers" not in service["metadata"]
    assert not any("kopf" in name for name in service["metadata"].get("annotations") or {})
    await client.delete(INFERENCE_SERVICE, namespace, "smollm2")
    await until(lambda: is_gone(client, DEPLOYMENT, namespace, "smollm2"), "the Deployment is collected")
    await until(lambda: is_gone(client, SERVICE, namespace, "smollm2"), "the Service is collected")


async def test_the_operator_never_writes_spec(client: KubeClient, namespace: str, operator: Operator) -> None:
    created = await client.create(INFERENCE_SERVICE, manifest(namespace))
    await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    await reaches(client, namespace, "RuntimeResolved", "True")
    found = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
    assert found["spec"] == created["spec"]
    assert found["metadata"]["generation"] == created["metadata"]["generation"]


async def test_manual_edits_are_undone_and_nothing_is_written_when_nothing_changed(
    client: KubeClient, namespace: str, operator: Operator
) -> None:
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    await until(lambda: client.get(PDB, namespace, "smollm2"), "the budget exists")
    await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    edit = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 1}}}, "metadata": {"labels": {"mine": "1"}}}
    await client.patch(DEPLOYMENT, namespace, "smollm2", edit)
    await client.delete(PDB, namespace, "smollm2")

    async def repaired() -> bool:
        await client.get(PDB, namespace, "smollm2")
        deployment = await client.get(DEPLOYMENT, namespace, "smollm2")
        return bool(deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 80)

    await until(repaired, "the edits are undone")
    deployment = await client.get(DEPLOYMENT, namespace, "smollm2")
    assert deployment["metadata"]["labels"]["mine"] == "1", "fields that are not ours are left alone"
    assert operator.room is not None
    await settles(operator)
    before = operator.room.client.writes
    await asyncio.sleep(3)
    assert operator.room.client.writes == before


async def settles(operator: Operator, quiet_s: float = 2.0) -> None:
    """Wait until the operator has written nothing for a while."""
    assert operator.room is not None
    deadline, since, writes = time.monotonic() + WAIT_S, time.monotonic(), -1
    while time.monotonic() < deadline and time.monotonic() - since < quiet_s:
        if operator.room.client.writes != writes:
            since, writes = time.monotonic(), operator.room.client.writes
        await asyncio.sleep(0.1)


async def test_a_restarted_operator_writes_nothing_and_changes_no_pod_template(
    client: KubeClient, namespace: str, node: FakeNode
) -> None:
    first = run_operator(namespace)
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    before = await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    await reaches(client, namespace, "RuntimeResolved", "True")
    await settles(first)
    first.stop()
    second = run_operator(namespace)
    try:
        await asyncio.sleep(4)
        assert second.room is not None
        assert second.room.client.writes == 0
        after = await client.get(DEPLOYMENT, namespace, "smollm2")
        assert after["metadata"]["generation"] == before["metadata"]["generation"]
    finally:
        second.stop()


async def test_removing_a_wish_prunes_what_it_made(client: KubeClient, namespace: str, operator: Operator) -> None:
    """An object that is no longer wanted goes; one of another owner under our labels stays."""
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    deployment = await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    owned = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "former",
            "namespace": namespace,
            "labels": deployment["metadata"]["labels"],
            "ownerReferences": deployment["metadata"]["ownerReferences"],
        },
    }
    foreign = {**owned, "metadata": {**owned["metadata"], "name": "foreign", "ownerReferences": []}}
    config_map = Kind("v1", "ConfigMap", "configmaps")
    await client.create(config_map, foreign)
    await client.create(config_map, owned)
    await until(lambda: is_gone(client, config_map, namespace, "former"), "the former object is pruned")
    await client.get(config_map, namespace, "foreign")


async def test_an_unsupported_wish_is_refused_with_its_path_and_heals(
    client: KubeClient, namespace: str, operator: Operator
) -> None:
    bad = manifest(namespace, podTemplate={"spec": {"hostNetwork": True}})
    await client.create(INFERENCE_SERVICE, bad)
    seen = await reaches(client, namespace, "Ready", "False", "PodTemplateRefused")
    assert "spec.podTemplate.spec.hostNetwork" in seen["message"]
    await client.patch(INFERENCE_SERVICE, namespace, "smollm2", {"spec": {"podTemplate": None}})
    await reaches(client, namespace, "RuntimeResolved", "True")
    await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")


async def test_external_mode_follows_the_scale_subresource(
    client: KubeClient, namespace: str, operator: Operator
) -> None:
    wish = manifest(namespace, autoscaling={"mode": "External"}, replicas=1)
    await client.create(INFERENCE_SERVICE, wish)
    await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    path = INFERENCE_SERVICE.path(namespace, "smollm2", "scale")
    found = await client._call("GET", path)
    assert found["spec"]["replicas"] == 1
    wish = {"spec": {"replicas": 2}}
    await client._call("PATCH", path, body=wish, content_type="application/merge-patch+json")

    async def scaled() -> bool:
        return bool((await client.get(DEPLOYMENT, namespace, "smollm2"))["spec"]["replicas"] == 2)

    await until(scaled, "the Deployment follows /scale")


class Engine:
    """A metrics page over HTTP whose load the test sets."""

    def __init__(self) -> None:
        self.waiting, self.running, self.kv = 0, 0, 0.0
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = (
                    f"octavo_requests_waiting {engine.waiting}\noctavo_requests_running {engine.running}\n"
                    f"octavo_kv_cache_utilization {engine.kv}\n"
                )
                self.send_response(200)
                self.end_headers()
                self.wfile.write(page.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


async def test_load_scales_up_and_the_status_explains_it(
    client: KubeClient, namespace: str, operator: Operator, node: FakeNode, plane: ControlPlane
) -> None:
    if not plane.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager: no pods are made")
    engine = Engine()
    node.annotations["smollm2"] = {"serving.octavo.dev/address": engine.address}
    try:
        await client.create(INFERENCE_SERVICE, manifest(namespace))
        await reaches(client, namespace, "ScalingActive", "True", "MetricsFresh")
        engine.waiting, engine.running, engine.kv = 20, 30, 0.95

        async def scaled() -> bool:
            return bool((await client.get(DEPLOYMENT, namespace, "smollm2"))["spec"]["replicas"] == 2)

        await until(scaled, "two replicas are wanted")

        async def explained() -> Any:
            service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
            return (service["status"].get("scaling") or {}).get("history")

        (event, *_) = await until(explained, "the status tells of the change")
        assert (event["from"], event["to"]) == (1, 2)
        assert "KVCacheUtilization" in event["reason"]
    finally:
        node.annotations.pop("smollm2")
        engine.stop()


async def test_an_idle_service_is_given_back_and_a_suspended_one_runs_nothing(
    client: KubeClient, namespace: str, operator: Operator
) -> None:
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    await client.patch(INFERENCE_SERVICE, namespace, "smollm2", {"spec": {"suspend": True}})

    async def stopped() -> bool:
        return bool((await client.get(DEPLOYMENT, namespace, "smollm2"))["spec"]["replicas"] == 0)

    await until(stopped, "no replica is wanted")
    await reaches(client, namespace, "Ready", "False", "Suspended")


async def test_a_model_cache_downloads_once_and_services_wait_for_it(
    client: KubeClient, namespace: str, operator: Operator
) -> None:
    spec = SMOLLM2["spec"]
    wish = manifest(namespace, model={**spec["model"], "cacheRef": {"name": "smollm2"}})
    await client.create(INFERENCE_SERVICE, wish)
    await reaches(client, namespace, "ModelReady", "False", "WaitingForModelCache")
    assert await is_gone(client, DEPLOYMENT, namespace, "smollm2")
    cache = {
        "apiVersion": MODEL_CACHE.api_version,
        "kind": "ModelCache",
        "metadata": {"name": "smollm2", "namespace": namespace},
        "spec": {"storageUri": spec["model"]["storageUri"], "storage": {"size": "1Gi"}},
    }
    await client.create(MODEL_CACHE, cache)
    job_kind = Kind("batch/v1", "Job", "jobs")
    job = await until(lambda: client.get(job_kind, namespace, "smollm2-download"), "the download Job exists")
    now = job["metadata"]["creationTimestamp"]
    done = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("SuccessCriteriaMet", "Complete")]
    status = {"conditions": done, "startTime": now, "completionTime": now, "succeeded": 1}
    await client.patch_status(job_kind, namespace, "smollm2-download", status)

    async def ready() -> Any:
        return (await condition(client, namespace, "Ready", MODEL_CACHE)).get("status") == "True"

    await until(ready, "the cache is ready")
    deployment = await until(lambda: client.get(DEPLOYMENT, namespace, "smollm2"), "the Deployment exists")
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"claimName": "smollm2-model", "readOnly": True} in [v.get("persistentVolumeClaim") for v in volumes]


def container(**state: Any) -> dict[str, Any]:
    """The status of a pod whose engine is in this state."""
    status = {"name": "engine", "image": "x", "imageID": "", "ready": False, "started": False, "restartCount": 0}
    return {"phase": "Running", "containerStatuses": [{**status, **state}], "conditions": [
        {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]}  # fmt: skip


ENDED = {
    "exitCode": 137,
    "reason": "OOMKilled",
    "finishedAt": "2026-01-01T00:00:00Z",
    "startedAt": "2026-01-01T00:00:00Z",
}
FAILED = {**ENDED, "exitCode": 1, "reason": "Error", "message": "ModelLoadError: hf://org/model: 404 Not Found"}
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (container(state={"waiting": {"reason": "ImagePullBackOff", "message": "denied"}}), "ImagePullFailed"),
        (container(state=BACK_OFF, lastState={"terminated": ENDED}, restartCount=2), "OOMKilled"),
        (container(state=BACK_OFF, lastState={"terminated": FAILED}, restartCount=2), "ModelNotFound"),
    ],
    ids=["image", "memory", "model"],
)
async def test_a_broken_replica_is_named_and_cleared_when_it_heals(
    client: KubeClient,
    namespace: str,
    operator: Operator,
    node: FakeNode,
    plane: ControlPlane,
    fault: dict[str, Any],
    reason: str,
) -> None:
    if not plane.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager: no pods are made")
    node.faults["smollm2"] = fault
    try:
        await client.create(INFERENCE_SERVICE, manifest(namespace))
        await reaches(client, namespace, "Ready", "False", reason)

        async def told() -> list[str]:
            events = await client.list_objects(EVENT, namespace)
            return [e["reason"] for e in events["items"] if e["reason"] == reason]

        assert await until(told, "an Event tells of it") == [reason]
    finally:
        node.faults.pop("smollm2")
    await reaches(client, namespace, "Ready", "True")


async def test_a_cluster_without_gpus_and_a_quota_are_named(
    client: KubeClient, namespace: str, operator: Operator, plane: ControlPlane
) -> None:
    if not plane.has_controllers or not plane.has_scheduler:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager or kube-scheduler")
    many = {"limits": {"cpu": "1", "nvidia.com/gpu": "64"}}
    await client.create(INFERENCE_SERVICE, manifest(namespace, resources=many))
    await reaches(client, namespace, "Ready", "False", "InsufficientGPU")
    await client.delete(INFERENCE_SERVICE, namespace, "smollm2")
    await until(lambda: is_gone(client, DEPLOYMENT, namespace, "smollm2"), "the Deployment is collected")
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small", "namespace": namespace},
        "spec": {"hard": {"limits.cpu": "1"}},
    }
    await client.create(Kind("v1", "ResourceQuota", "resourcequotas"), quota)
    await until(lambda: _quota_counts(client, namespace), "the quota is in force")
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    await reaches(client, namespace, "Ready", "False", "QuotaExceeded")


async def _quota_counts(client: KubeClient, namespace: str) -> bool:
    quota = await client.get(Kind("v1", "ResourceQuota", "resourcequotas"), namespace, "small")
    return bool((quota.get("status") or {}).get("hard"))


async def test_one_operator_leads_and_another_takes_over(client: KubeClient, namespace: str) -> None:
    def settings(name: str) -> OperatorSettings:
        return OperatorSettings(own_namespace=namespace, identity=name, lease_duration_s=2.0, lease_renew_s=0.3)

    first, second = LeaderElection(client, settings("first")), LeaderElection(client, settings("second"))
    await first.acquire()
    holding = asyncio.create_task(first.hold())
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(3)
    assert not waiting.done(), "a lease that is renewed is not taken"
    holding.cancel()  # the first dies without giving the lease back
    await asyncio.wait_for(waiting, 20)
    assert await first._try() is False, "the old leader cannot take it back"
    await second.release()
    await asyncio.wait_for(first.acquire(), 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas must not exceed maxReplicas"),
        ({"replicas": 1}, "replicas is fixed by hand"),
        ({"model": {"storageUri": "file:///x"}}, "must start with one of"),
        ({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}, "must not both be 0"),
        ({"model": {"storageUri": "hf://a/b", "maxModelLength": 1}}, "unknown field"),
        ({"engine": {"env": [{"name": "LD_PRELOAD", "value": "x"}]}}, "which code is loaded"),
    ],
)
async def test_the_api_server_itself_refuses_bad_specs(
    client: KubeClient, namespace: str, spec: dict[str, Any], message: str
) -> None:
    path = INFERENCE_SERVICE.path(namespace)
    params = {"fieldValidation": "Strict", "dryRun": "All"}
    with pytest.raises(ApiError) as refused:
        await client._call("POST", path, params=params, body=manifest(namespace, **spec))
    assert message in str(refused.value)


async def test_the_task_cannot_be_changed(client: KubeClient, namespace: str) -> None:
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    with pytest.raises(ApiError, match="task cannot be changed"):
        await client.patch(INFERENCE_SERVICE, namespace, "smollm2", {"spec": {"model": {"task": "Embed"}}})


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_full_cluster_is_named_and_an_update_in_place_completes(
    client: KubeClient, namespace: str, operator: Operator, node: FakeNode, plane: ControlPlane, replicas: int
) -> None:
    """Every GPU is taken: the default rollout needs one more and says so while the old replicas serve on."""
    if not plane.has_controllers or not plane.has_scheduler:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager or kube-scheduler")
    each = {"limits": {"cpu": "1", "nvidia.com/gpu": str(2 // replicas)}}  # the node has two
    wish = manifest(namespace, resources=each, replicas=replicas, autoscaling=None)
    await client.create(INFERENCE_SERVICE, wish)
    await reaches(client, namespace, "Ready", "True", "MinimumReplicasAvailable")
    service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
    resolved = next(c for c in service["status"]["conditions"] if c["type"] == "RuntimeResolved")
    assert "maxSurge: 0" in resolved["message"]
    change: dict[str, Any] = {"engine": {**SMOLLM2["spec"]["engine"], "maxNumSeqs": 7}}
    await client.patch(INFERENCE_SERVICE, namespace, "smollm2", {"spec": change})
    await reaches(client, namespace, "PodsScheduled", "False", "InsufficientGPU")
    assert (await condition(client, namespace, "Ready"))["status"] == "True"
    in_place = {"spec": {"rollout": {"maxSurge": 0, "maxUnavailable": 1}}}
    await client.patch(INFERENCE_SERVICE, namespace, "smollm2", in_place)
    await reaches(client, namespace, "Progressing", "False", "Complete")

    async def renewed() -> bool:
        pods = (await client.list_objects(POD, namespace))["items"]
        words = [
            pod["spec"]["containers"][0]["command"] for pod in pods if not pod["metadata"].get("deletionTimestamp")
        ]
        return len(words) == replicas and all("7" in command for command in words)

    await until(renewed, "every replica is of the new spec")
    await reaches(client, namespace, "Ready", "True", "MinimumReplicasAvailable")
    await client.delete(INFERENCE_SERVICE, namespace, "smollm2")  # the GPUs are wanted again

    async def freed() -> bool:
        return not (await client.list_objects(POD, namespace))["items"]

    await until(freed, "the replicas are gone")


async def test_a_large_resource_is_reconciled_and_kopf_leaves_no_trace(
    client: KubeClient, namespace: str, operator: Operator, plane: ControlPlane
) -> None:
    """kopf would copy what it saw into an annotation of at most 256 KiB, and onto pods, whose runtimes take less."""
    if not plane.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager: no pods are made")
    large = manifest(namespace)
    large["metadata"]["annotations"] = {"team.example/notes": "x" * 200 * 1024}
    await client.create(INFERENCE_SERVICE, large)
    await reaches(client, namespace, "Ready", "True", "MinimumReplicasAvailable")
    await client.patch(INFERENCE_SERVICE, namespace, "smollm2", {"spec": {"engine": {"maxNumSeqs": 9}}})
    await reaches(client, namespace, "Progressing", "False", "Complete")
    pods = (await client.list_objects(POD, namespace))["items"]
    service = await client.get(INFERENCE_SERVICE, namespace, "smollm2")
    for obj in (*pods, service):
        traces = [*(obj["metadata"].get("annotations") or {}), *(obj["metadata"].get("finalizers") or [])]
        assert not [trace for trace in traces if "kopf" in trace]


async def test_a_namespace_can_be_deleted_when_no_operator_is_there(
    client: KubeClient, namespace: str, node: FakeNode, plane: ControlPlane
) -> None:
    if not plane.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS lacks kube-controller-manager: nothing is collected")
    operator = run_operator(namespace)
    await client.create(INFERENCE_SERVICE, manifest(namespace))
    await reaches(client, namespace, "Ready", "True")
    operator.stop()
    await client.delete(NAMESPACE, None, namespace)
    await until(lambda: is_gone(client, NAMESPACE, "", namespace), "the namespace is gone", 60)
