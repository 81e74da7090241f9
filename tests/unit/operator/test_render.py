from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.manifest import load_manifests
from octavo_operator.api.validation import parse
from octavo_operator.desired import render_resources
from octavo_operator.plan import Facts, Unplannable, plan
from octavo_operator.render import Owner, render_plan
from octavo_operator.render.patch import merge
from octavo_operator.render.pod import POD_ENV, fill

ROOT = Path(__file__).parents[3]
SMOLLM2 = ROOT / "examples" / "smollm2.yaml"


def service(**spec: Any) -> InferenceService:
    spec.setdefault("model", {"storageUri": "hf://org/model"})
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": spec,
    }
    return parse(InferenceService, document)


def rendered(**spec: Any) -> dict[str, Any]:
    """The objects of a service by `Kind/name`."""
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in render_plan(plan(service(**spec)))}


def pod(**spec: Any) -> dict[str, Any]:
    template: dict[str, Any] = rendered(**spec)["Deployment/chat"]["spec"]["template"]["spec"]
    return template


def refused(template: dict[str, Any]) -> list[str]:
    with pytest.raises(Unplannable) as caught:
        render_plan(plan(service(podTemplate=template)))
    assert caught.value.reason == "PodTemplateRefused"
    return [error.path.removeprefix("spec.podTemplate.") for error in caught.value.errors]


def test_a_service_becomes_one_object_of_each_kind() -> None:
    assert sorted(rendered(observability={"podMonitor": True})) == [
        "ConfigMap/chat-route",
        "Deployment/chat",
        "NetworkPolicy/chat",
        "PodDisruptionBudget/chat",
        "PodMonitor/chat",
        "Service/chat",
        "Service/chat-replicas",
        "ServiceAccount/chat",
    ]


def test_rendering_is_deterministic_and_owned() -> None:
    owner = Owner("InferenceService", "chat", "uid-1")
    first, second = (render_plan(plan(service()), owner) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert all(o["metadata"]["ownerReferences"][0]["uid"] == "uid-1" for o in first)


def test_the_manifest_means_the_same_to_a_laptop_and_to_a_cluster() -> None:
    """argv, env, probes and drain of the Plan, which local mode runs, equal those of the rendered pod."""
    (subject,) = load_manifests([SMOLLM2])
    assert isinstance(subject, InferenceService)
    (local,) = load_manifests([SMOLLM2], local=True)
    assert isinstance(local, InferenceService)
    (workload,) = plan(local).workloads
    deployment = next(o for o in render_plan(plan(subject)) if o["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"] == [fill(word, workload.port) for word in workload.argv]
    env = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    assert env == {**POD_ENV, **workload.env}
    for name, probe in (
        ("startupProbe", workload.probes.startup),
        ("readinessProbe", workload.probes.readiness),
        ("livenessProbe", workload.probes.liveness),
    ):
        assert container[name]["httpGet"]["path"] == probe.path
        assert container[name]["periodSeconds"] == probe.period_s
        assert container[name]["failureThreshold"] == probe.failure_threshold
    assert spec["terminationGracePeriodSeconds"] == workload.drain.grace_period_s
    assert deployment["spec"]["replicas"] == workload.replicas.initial


def test_pods_are_restricted() -> None:
    spec = pod()
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_secrets_appear_by_reference_only() -> None:
    spec = pod(model={"storageUri": "hf://o/m", "credentialsSecretRef": {"name": "hub", "key": "token"}})
    (variable,) = [e for e in spec["containers"][0]["env"] if e["name"] == "HF_TOKEN"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


def test_gpu_services_ask_for_gpus_and_tolerate_their_taint() -> None:
    spec = pod(
        resources={"limits": {"nvidia.com/gpu": 2}}, accelerator={"type": "NVIDIA-H200"}, scheduling={"queueName": "q"}
    )
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in spec["volumes"]


def test_the_disruption_budget_never_blocks_a_single_replica() -> None:
    assert rendered()["PodDisruptionBudget/chat"]["spec"]["maxUnavailable"] == 1


def test_the_network_policy_keeps_engines_from_cloud_metadata() -> None:
    egress = rendered()["NetworkPolicy/chat"]["spec"]["egress"]
    assert {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}} in egress[0]["to"]


def test_the_route_tells_gateways_everything_with_defaults() -> None:
    route = json.loads(rendered()["ConfigMap/chat-route"]["data"]["route.json"])
    assert route["models"] == ["chat"]
    assert route["saturation"] == {"queueDepth": 4, "kvCacheUtilization": 0.9}
    assert route["hold"] == {"maxHeldRequests": 500, "timeoutSeconds": 300.0}
    assert route["metrics"]["queueDepth"][0] == {"gauge": "octavo_requests_waiting"}


def test_kv_events_go_to_the_gateway_alone() -> None:
    objects = rendered(routing={"kvEvents": True})
    (container,) = objects["Deployment/chat"]["spec"]["template"]["spec"]["containers"]
    told = " ".join(container["command"])
    assert "--kv-events-endpoint tcp://0.0.0.0:5557 --kv-events-replay-endpoint tcp://0.0.0.0:5558" in told
    assert "--no-kv-events-token-ids" in container["command"], "what users wrote stays in the replica"
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == {
        "http": 8000,
        "kv-events": 5557,
        "kv-replay": 5558,
    }
    route = json.loads(objects["ConfigMap/chat-route"]["data"]["route.json"])
    assert route["kvEvents"] == {"port": 5557, "replayPort": 5558}
    everyone, gateway = objects["NetworkPolicy/chat"]["spec"]["ingress"]
    assert [p["port"] for p in everyone["ports"]] == ["http"]
    assert [p["port"] for p in gateway["ports"]] == ["kv-events", "kv-replay"]
    (source,) = gateway["from"]
    assert source["podSelector"]["matchExpressions"][0]["values"] == ["gateway"]


def test_without_kv_events_nothing_listens_for_them() -> None:
    objects = rendered()
    (container,) = objects["Deployment/chat"]["spec"]["template"]["spec"]["containers"]
    assert not [word for word in container["command"] if "kv-events" in word]
    assert json.loads(objects["ConfigMap/chat-route"]["data"]["route.json"])["kvEvents"] is None
    assert len(objects["NetworkPolicy/chat"]["spec"]["ingress"]) == 1


def test_pod_templates_are_the_same_whichever_replicas_and_owner() -> None:
    """A scale or a new operator must not restart pods: nothing but the spec is in the template."""
    planned = plan(service())
    templates = [
        next(o for o in render_plan(planned, owner, replicas) if o["kind"] == "Deployment")["spec"]["template"]
        for owner, replicas in ((None, None), (Owner("InferenceService", "chat", "u"), 7))
    ]
    assert templates[0] == templates[1]


def test_pod_templates_stay_what_earlier_releases_rendered() -> None:
    """A changed template restarts every engine of every user on upgrade. Change this file only for a good reason."""
    golden = Path(__file__).parent / "golden"
    (subject,) = load_manifests([golden / "service.yaml"])
    assert isinstance(subject, InferenceService)
    planned = plan(subject, None, Facts(engine_image="example.com/engine:1"))
    template = next(o for o in render_plan(planned) if o["kind"] == "Deployment")["spec"]["template"]
    assert template == json.loads((golden / "pod_template.json").read_text())


def test_a_pod_template_patch_merges_by_name() -> None:
    spec = pod(
        podTemplate={
            "metadata": {"annotations": {"team": "a"}},
            "spec": {
                "containers": [
                    {"name": "engine", "env": [{"name": "A", "value": "1"}]},
                    {
                        "name": "sidecar",
                        "image": "s:1",
                        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    },
                ],
                "volumes": [{"name": "extra", "emptyDir": {}}],
                "topologySpreadConstraints": None,
            },
        }
    )
    assert [c["name"] for c in spec["containers"]] == ["engine", "sidecar"]
    assert {"name": "A", "value": "1"} in spec["containers"][0]["env"]
    assert "command" in spec["containers"][0]
    assert [v["name"] for v in spec["volumes"]] == ["cache", "tmp", "extra"]
    assert "topologySpreadConstraints" not in spec


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ({"spec": {"hostNetwork": True}}, "spec.hostNetwork"),
        ({"spec": {"hostPID": True}}, "spec.hostPID"),
        ({"spec": {"automountServiceAccountToken": True}}, "spec.automountServiceAccountToken"),
        ({"spec": {"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}}, "spec.volumes[2].hostPath"),
        (
            {"spec": {"volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {}}]}}]}},
            "spec.volumes[2].projected",
        ),
        (
            {"spec": {"containers": [{"name": "engine", "securityContext": {"privileged": True}}]}},
            "spec.containers[0].securityContext.privileged",
        ),
        (
            {"spec": {"containers": [{"name": "engine", "securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}]}},
            "spec.containers[0].securityContext.capabilities.add",
        ),
        (
            {"spec": {"containers": [{"name": "engine", "env": [{"name": "LD_PRELOAD", "value": "x"}]}]}},
            "spec.containers[0].env[7].name",
        ),
        (
            {"spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 8000, "hostPort": 80}]}]}},
            "spec.containers[0].ports[0].hostPort",
        ),
        ({"spec": {"securityContext": {"runAsUser": 0}}}, "spec.securityContext.runAsUser"),
        ({"spec": {"securityContext": {"runAsNonRoot": None}}}, "spec.securityContext.runAsNonRoot"),
        ({"spec": {"terminationGracePeriodSeconds": 30}}, "spec.terminationGracePeriodSeconds"),
        (
            {"metadata": {"labels": {"serving.octavo.dev/inferenceservice": "other"}}},
            "metadata.labels[serving.octavo.dev/inferenceservice]",
        ),
    ],
)
def test_dangerous_pod_templates_are_refused_by_path(template: dict[str, Any], path: str) -> None:
    assert refused(template) == [path]


def test_an_init_container_is_held_to_the_same_rules() -> None:
    assert "spec.initContainers[0].securityContext.allowPrivilegeEscalation" in refused(
        {"spec": {"initContainers": [{"name": "i", "image": "x", "securityContext": {"privileged": True}}]}}
    )


def test_merge_directives_delete_and_replace() -> None:
    base = {"containers": [{"name": "a", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}], "args": ["1"]}
    assert merge(base, {"containers": [{"name": "b", "$patch": "delete"}]})["containers"] == [base["containers"][0]]
    assert merge(base, {"containers": [{"$patch": "replace"}, {"name": "c"}]})["containers"] == [{"name": "c"}]
    assert merge(base, {"args": ["2", "3"]})["args"] == ["2", "3"]


def test_a_model_cache_becomes_a_claim_and_one_download() -> None:
    text = (
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: ModelCache\nmetadata: {name: llama, namespace: team}\n"
        "spec: {storageUri: 'hf://o/m', revision: main, storage: {size: 20Gi},"
        " credentialsSecretRef: {name: hub, key: token}}\n"
    )
    from octavo_operator.api.manifest import parse_manifests

    objects, _ = render_resources(parse_manifests(text))
    claim, job = objects
    assert claim["spec"]["resources"]["requests"]["storage"] == "20Gi"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["octavo", "pull", "hf://o/m"]
    assert container["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}


def test_replicas_of_a_cached_model_mount_the_claim_read_only() -> None:
    texts = (
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: ModelCache\nmetadata: {name: llama}\n"
        "spec: {storageUri: 'hf://o/m', storage: {size: 20Gi}}\n---\n"
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: chat}\n"
        "spec: {model: {storageUri: 'hf://o/m', cacheRef: {name: llama}}}\n"
    )
    from octavo_operator.api.manifest import parse_manifests

    objects, warnings = render_resources(parse_manifests(texts))
    assert warnings == []
    spec = objects[-1]["spec"]["template"]["spec"]
    assert spec["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "llama-model", "readOnly": True}
