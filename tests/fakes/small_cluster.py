"""A cluster in memory for one service: what the operator applies is kept, and pods of Deployments become ready.

It is no API server: apply replaces, nothing is validated, and one step of its controllers is a call. The same
scenarios run against a real one in tests/e2e.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import aiohttp

from octavo_operator.controller.client import ApiError, Kind, KubeClient, Object
from octavo_operator.controller.kinds import DEPLOYMENT, EVENT, INFERENCE_SERVICE, POD
from octavo_operator.controller.store import Store

START = "2026-01-01T00:00:00Z"


class SmallCluster(KubeClient):
    """Client and controllers at once. Names in `broken` are Deployments whose pods crash."""

    def __init__(self, store: Store, session: aiohttp.ClientSession) -> None:
        super().__init__("http://127.0.0.1:9", session)
        self.store = store
        self.events: list[str] = []
        self.broken: set[str] = set()
        self._numbers = itertools.count(1)

    async def apply(self, kind: Kind, obj: Object) -> Object:
        self.writes += 1
        found = self.store.get(kind, obj["metadata"].get("namespace"), obj["metadata"]["name"])
        generation = found["metadata"]["generation"] if found else 0
        changed = found is None or found.get("spec") != obj.get("spec")
        metadata = {**obj["metadata"], "generation": generation + changed}
        metadata.setdefault("uid", f"uid-{next(self._numbers)}")
        kept: Object = {**json.loads(json.dumps(obj)), "metadata": metadata}
        if found is not None and "status" in found:
            kept["status"] = found["status"]
        self.store.put(kind, kept)
        return kept

    async def delete(self, kind: Kind, namespace: str | None, name: str, uid: str | None = None) -> None:
        self.writes += 1
        if found := self.store.get(kind, namespace, name):
            self.store.remove(kind, found)

    async def patch_status(self, kind: Kind, namespace: str | None, name: str, status: Object) -> Object:
        self.writes += 1
        found = self.store.get(kind, namespace, name)
        if found is None:
            raise ApiError("PATCH", 404, "not found")
        return {**found, "status": json.loads(json.dumps(status))}

    async def create(self, kind: Kind, obj: Object) -> Object:
        if kind == EVENT:
            self.events.append(obj["reason"])
        return obj

    def submit(self, document: Object) -> None:
        """What `kubectl apply` of an InferenceService does."""
        key = document["metadata"]["namespace"], document["metadata"]["name"]
        found = self.store.get(INFERENCE_SERVICE, *key) or {"metadata": {"generation": 0}}
        metadata = {**document["metadata"], "uid": "uid-0", "generation": found["metadata"]["generation"] + 1}
        self.store.put(INFERENCE_SERVICE, {**document, "metadata": metadata, **_status(found)})

    def settle(self) -> None:
        """Deployments replace their pods at once, ready or crashing; pods without an owner go."""
        alive = set()
        for deployment in self.store.all(DEPLOYMENT):
            metadata, spec = deployment["metadata"], deployment["spec"]
            template_hash = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()[:8]
            broken = metadata["name"] in self.broken
            for number in range(spec["replicas"]):
                pod = _pod(f"{metadata['name']}-{template_hash}-{number}", metadata, spec, template_hash, broken)
                alive.add(pod["metadata"]["name"])
                self.store.put(POD, pod)
            count = spec["replicas"]
            status = {
                "observedGeneration": metadata["generation"],
                "replicas": count,
                "updatedReplicas": count,
                "readyReplicas": 0 if broken else count,
            }
            self.store.put(DEPLOYMENT, {**deployment, "status": status})
        for pod in self.store.all(POD):
            if pod["metadata"]["name"] not in alive:
                self.store.remove(POD, pod)


def _status(found: Object) -> Object:
    return {"status": found["status"]} if "status" in found else {}


def _pod(name: str, deployment: Object, spec: Object, template_hash: str, broken: bool) -> dict[str, Any]:
    labels = {**spec["template"]["metadata"]["labels"], "pod-template-hash": template_hash}
    container: dict[str, Any] = {"name": "engine", "restartCount": 0, "started": True, "ready": True}
    if broken:
        ended = {"exitCode": 1, "reason": "Error", "message": "ValueError: boom"}
        waiting = {"reason": "CrashLoopBackOff"}
        container |= {"started": False, "ready": False, "restartCount": 3}
        container |= {"state": {"waiting": waiting}, "lastState": {"terminated": ended}}
    ready = {"type": "Ready", "status": "False" if broken else "True", "lastTransitionTime": START}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": deployment["namespace"],
            "labels": labels,
            "creationTimestamp": START,
        },
        "status": {
            "phase": "Running",
            "podIP": "198.51.100.1",
            "conditions": [{"type": "PodScheduled", "status": "True"}, ready],
            "containerStatuses": [container],
        },
    }
