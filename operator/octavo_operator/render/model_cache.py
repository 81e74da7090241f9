"""ModelCache: a PersistentVolumeClaim, and a Job that downloads the model into it once."""

from __future__ import annotations

from typing import Any

from octavo_operator.api.inference_service import is_dns_label
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.plan.values import DEFAULT_ENGINE_IMAGE, Facts
from octavo_operator.render.labels import COMPONENT, MANAGED_BY, MANAGER, PART_OF

MODEL_FOLDER = "model"
ONE_FILE = (".gguf", ".onnx", ".pt", ".pt2")
VOLUME_MOUNT = "/mnt/model-cache"
USER = 65_532
CACHE_LABEL = "serving.octavo.dev/modelcache"
BACKOFF_LIMIT = 6
MAX_JOB_NAME = 52
DOWNLOAD_CONTAINER = "download"


def claim_name(cache: ModelCache) -> str:
    """Name of the claim that holds the model."""
    return f"{cache.metadata.name}-model"


def model_path(cache: ModelCache) -> str:
    """Path of the model within the volume, as `octavo pull` leaves it: a file of its own name, or a folder."""
    name = cache.spec.storage_uri.rstrip("/").rpartition("/")[2]
    return f"{MODEL_FOLDER}/{name}" if name.endswith(ONE_FILE) else MODEL_FOLDER


def render_model_cache(cache: ModelCache, facts: Facts) -> list[dict[str, Any]]:
    """The claim and the download Job."""
    return [_claim(cache), _job(cache, facts)]


def _metadata(cache: ModelCache, name: str) -> dict[str, Any]:
    label = cache.metadata.name if is_dns_label(cache.metadata.name) else ""
    return {
        "name": name,
        "namespace": cache.metadata.namespace or "default",
        "labels": {CACHE_LABEL: label[:63], COMPONENT: "model-cache", MANAGED_BY: MANAGER, PART_OF: "octavo"},
    }


def _claim(cache: ModelCache) -> dict[str, Any]:
    storage = cache.spec.storage
    spec: dict[str, Any] = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": str(storage.size)}},
    }
    if storage.storage_class_name is not None:
        spec["storageClassName"] = storage.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(cache, claim_name(cache)),
        "spec": spec,
    }


def _job(cache: ModelCache, facts: Facts) -> dict[str, Any]:
    metadata = _metadata(cache, f"{cache.metadata.name[:MAX_JOB_NAME]}-download")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "template": {
                "metadata": {"labels": metadata["labels"]},
                "spec": _pod_spec(cache, facts),
            },
        },
    }


def _pod_spec(cache: ModelCache, facts: Facts) -> dict[str, Any]:
    scheduling = cache.spec.scheduling
    spec: dict[str, Any] = {
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(cache, facts)],
        "volumes": [
            {"name": "model", "persistentVolumeClaim": {"claimName": claim_name(cache)}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    if scheduling.node_selector:
        spec["nodeSelector"] = scheduling.node_selector
    if scheduling.tolerations:
        spec["tolerations"] = [t.model_dump(by_alias=True, exclude_none=True) for t in scheduling.tolerations]
    return spec


def _container(cache: ModelCache, facts: Facts) -> dict[str, Any]:
    command = ["octavo", "pull", cache.spec.storage_uri, "--to", f"{VOLUME_MOUNT}/{MODEL_FOLDER}"]
    if cache.spec.revision:
        command += ["--revision", cache.spec.revision]
    env: list[dict[str, Any]] = [{"name": "HOME", "value": "/tmp"}, {"name": "PYTHONUNBUFFERED", "value": "1"}]  # noqa: S108
    secret = cache.spec.credentials_secret_ref
    if secret is not None:
        name = "HF_TOKEN" if cache.spec.storage_uri.startswith("hf://") else "OCTAVO_STORAGE_TOKEN"
        env.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}})
    return {
        "name": DOWNLOAD_CONTAINER,
        "image": facts.engine_image or DEFAULT_ENGINE_IMAGE,
        "command": command,
        "env": env,
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "model", "mountPath": VOLUME_MOUNT},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }
