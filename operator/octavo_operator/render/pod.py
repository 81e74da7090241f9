"""The pod of one replica: restricted security, probes, drain, volumes; then the service's own patch."""

from __future__ import annotations

from typing import Any

from octavo_operator.api.errors import FieldError
from octavo_operator.plan.arguments import HOST, KV_EVENTS, KV_REPLAY, PORT
from octavo_operator.plan.values import HttpProbe, Unplannable, Workload
from octavo_operator.render.labels import ENGINE_CONTAINER, GRPC_PORT, HTTP_PORT, KV_EVENTS_PORTS, labels, selector
from octavo_operator.render.patch import merge
from octavo_operator.render.pod_safety import refused_fields

CACHE_PATH = "/var/cache/octavo"
LISTEN = "0.0.0.0"

# What a pod needs to write, given that its root file system is read-only.
POD_ENV = {
    "HOME": CACHE_PATH,
    "XDG_CACHE_HOME": CACHE_PATH,
    "OCTAVO_CACHE_DIR": f"{CACHE_PATH}/models",
    "HF_HOME": f"{CACHE_PATH}/huggingface",
    "TRITON_CACHE_DIR": f"{CACHE_PATH}/triton",
    "PYTHONUNBUFFERED": "1",
}


def pod_template(workload: Workload) -> dict[str, Any]:
    """The pod template. Raises `Unplannable` when the service's patch asks for something that is refused."""
    template = {
        "metadata": {
            "labels": labels(workload),
            "annotations": {"kubectl.kubernetes.io/default-container": ENGINE_CONTAINER},
        },
        "spec": _pod_spec(workload),
    }
    if queue := workload.scheduling.queue_name:
        template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue
    if not workload.pod_template:
        return template
    merged: dict[str, Any] = merge(template, dict(workload.pod_template))
    errors = refused_fields(merged, workload.drain.grace_period_s, selector(workload.service))
    if errors:
        raise Unplannable(
            "PodTemplateRefused",
            [FieldError(f"spec.podTemplate.{e.path}", e.message, e.value) for e in errors],
        )
    return merged


def _pod_spec(workload: Workload) -> dict[str, Any]:
    scheduling = workload.scheduling
    spec: dict[str, Any] = {
        "serviceAccountName": workload.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": workload.drain.grace_period_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": workload.run_as_user,
            "runAsGroup": workload.run_as_user,
            "fsGroup": workload.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(workload)],
        "volumes": _volumes(workload),
    }
    if node_selector := {**workload.node_labels, **scheduling.node_selector}:
        spec["nodeSelector"] = node_selector
    if tolerations := _tolerations(workload):
        spec["tolerations"] = tolerations
    if scheduling.affinity:
        spec["affinity"] = scheduling.affinity
    spec["topologySpreadConstraints"] = scheduling.topology_spread_constraints or [_spread_over_nodes(workload)]
    names = {
        "priorityClassName": scheduling.priority_class_name,
        "schedulerName": scheduling.scheduler_name,
        "runtimeClassName": scheduling.runtime_class_name,
    }
    spec.update({key: name for key, name in names.items() if name})
    if workload.resource_claims:
        spec["resourceClaims"] = [{"name": n, "resourceClaimTemplateName": n} for n in workload.resource_claims]
    return spec


def _container(workload: Workload) -> dict[str, Any]:
    ports = [{"name": HTTP_PORT, "containerPort": workload.port, "protocol": "TCP"}]
    if workload.grpc_port is not None:
        ports.append({"name": GRPC_PORT, "containerPort": workload.grpc_port, "protocol": "TCP"})
    if workload.routing.kv_events:
        ports += [{"name": n, "containerPort": p, "protocol": "TCP"} for n, p in KV_EVENTS_PORTS.items()]
    container: dict[str, Any] = {
        "name": ENGINE_CONTAINER,
        "image": workload.image,
        "command": [fill(word, workload.port) for word in workload.argv],
        "env": _env(workload),
        "ports": ports,
        "resources": _resources(workload),
        "startupProbe": _probe(workload.probes.startup),
        "readinessProbe": _probe(workload.probes.readiness),
        "livenessProbe": _probe(workload.probes.liveness),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # status then holds the last log line of a crash
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": not workload.writable_root,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(workload),
    }
    if workload.drain.pre_stop_sleep_s:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": workload.drain.pre_stop_sleep_s}}}
    return container


def fill(word: str, port: int) -> str:
    """An argument with the addresses to listen on."""
    events, replay = (f"tcp://{LISTEN}:{number}" for number in KV_EVENTS_PORTS.values())
    return word.replace(HOST, LISTEN).replace(PORT, str(port)).replace(KV_EVENTS, events).replace(KV_REPLAY, replay)


def _env(workload: Workload) -> list[dict[str, Any]]:
    plain = {**POD_ENV, **workload.env}
    entries: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
    entries += [
        {"name": r.name, "valueFrom": r.source.model_dump(by_alias=True, exclude_none=True)}
        for r in workload.env_references
    ]
    entries.append({"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})
    return entries


def _resources(workload: Workload) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if workload.resources.requests:
        resources["requests"] = dict(workload.resources.requests)
    if workload.resources.limits:
        resources["limits"] = dict(workload.resources.limits)
    if workload.resource_claims:
        resources["claims"] = [{"name": name} for name in workload.resource_claims]
    return resources


def _probe(probe: HttpProbe) -> dict[str, Any]:
    return {
        "httpGet": {"path": probe.path, "port": HTTP_PORT},
        "periodSeconds": probe.period_s,
        "timeoutSeconds": probe.timeout_s,
        "failureThreshold": probe.failure_threshold,
    }


def _mounts(workload: Workload) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "cache", "mountPath": CACHE_PATH},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a path within the pod
    ]
    if workload.resources.accelerators > 1:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108
    mounts += [
        {"name": _claim_volume(index), "mountPath": mount.mount_path, "readOnly": True}
        for index, mount in enumerate(workload.claims)
    ]
    return mounts


def _volumes(workload: Workload) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]
    if workload.resources.accelerators > 1:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    volumes += [
        {"name": _claim_volume(index), "persistentVolumeClaim": {"claimName": mount.claim, "readOnly": True}}
        for index, mount in enumerate(workload.claims)
    ]
    return volumes


def _claim_volume(index: int) -> str:
    return f"model-{index}"


def _tolerations(workload: Workload) -> list[dict[str, Any]]:
    written = [t.model_dump(by_alias=True, exclude_none=True) for t in workload.scheduling.tolerations]
    accelerator = workload.resources.accelerator
    if accelerator and not any(t.get("key") == accelerator for t in written):
        written.append({"key": accelerator, "operator": "Exists", "effect": "NoSchedule"})
    return written


def _spread_over_nodes(workload: Workload) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector(workload.service)},
    }
