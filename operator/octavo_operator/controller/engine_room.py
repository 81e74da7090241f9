"""Everything that works while this operator leads: the store, its watches, the queues, the scaling loop."""

from __future__ import annotations

import asyncio
import logging
import time

from octavo_operator.controller.adapters import AdapterLoop
from octavo_operator.controller.client import ApiError, Kind, KubeClient, Object
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.informer import Informer
from octavo_operator.controller.kinds import (
    CHILDREN,
    CLUSTER_SERVING_RUNTIME,
    INFERENCE_SERVICE,
    INFERENCE_TENANT,
    MODEL_CACHE,
    OPTIONAL_CHILDREN,
    POD,
    SERVING_RUNTIME,
)
from octavo_operator.controller.model_caches import ModelCacheReconciler
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.scaling import ScalingLoop
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Key, Store, key_of
from octavo_operator.controller.tenants import TenantLoop
from octavo_operator.controller.tracing import new_tracer
from octavo_operator.controller.work_queue import WorkQueue
from octavo_operator.render.labels import MANAGED_BY, MANAGER, PART_OF, SERVICE_LABEL
from octavo_operator.render.model_cache import CACHE_LABEL

log = logging.getLogger("octavo.operator")
OWN_KINDS = (INFERENCE_SERVICE, SERVING_RUNTIME, CLUSTER_SERVING_RUNTIME, MODEL_CACHE, INFERENCE_TENANT)
OURS = f"{MANAGED_BY}={MANAGER}"
PODS = f"{PART_OF}=octavo"


class EngineRoom:
    """Created and run within the loop of kopf. `see` is called by kopf's handlers with every object of our kinds."""

    def __init__(self, client: KubeClient, settings: OperatorSettings) -> None:
        self.settings = settings
        self.client = client
        self.store = Store()
        events = EventRecorder(client)
        tracer = client.tracer = new_tracer(settings.otlp_endpoint)
        self.reconciler = Reconciler(client, self.store, events, settings, tracer=tracer)
        self.caches = ModelCacheReconciler(client, self.store, events, settings)
        self.services: WorkQueue[Key] = WorkQueue(self.reconciler.reconcile, settings.workers)
        self.cache_queue: WorkQueue[Key] = WorkQueue(self.caches.reconcile, 1)
        self.scaling = ScalingLoop(client, self.reconciler, self.store, settings, self.services.add, tracer=tracer)
        self.tenants = TenantLoop(client, self.store, settings)
        self.adapters = AdapterLoop(client, self.reconciler, self.store, settings, self.services.add)
        scopes: tuple[str | None, ...] = settings.namespaces or (None,)
        self.informers = [
            Informer(client, self.store, kind, OURS, self._child_changed, scope)
            for kind in CHILDREN
            for scope in scopes
        ]
        pod_scopes = scopes if None in scopes else tuple({*scopes, settings.own_namespace})
        self.informers += [Informer(client, self.store, POD, PODS, self._child_changed, s) for s in pod_scopes]
        self._listed_at = time.monotonic()  # when our own kinds were last listed in full

    async def run(self) -> None:
        """Work until cancelled. Nothing is written before every watch has listed once."""
        async with asyncio.TaskGroup() as group:
            await self._find_optional_kinds()
            for informer in self.informers:
                group.create_task(informer.run())
            for informer in self.informers:
                await informer.synced.wait()
            log.info("watching; reconciling begins")
            group.create_task(self.services.run())
            group.create_task(self.cache_queue.run())
            group.create_task(self.scaling.run())
            group.create_task(self.adapters.run())
            if not self.settings.namespaces:  # an install for some namespaces writes nothing that is the cluster's
                group.create_task(self.tenants.run())
            group.create_task(self.reconciler.hub.run(self.services.add))
            group.create_task(self._relist_forever())

    async def _find_optional_kinds(self) -> None:
        """Watch what a cluster need not have, where it has it; what is installed later is found at the next start."""
        for kind in OPTIONAL_CHILDREN:
            try:
                found = await self.client.serves(kind)
            except ApiError as error:
                log.warning(
                    "%s: the API server did not say whether it has them (%s); going on without", kind.plural, error
                )
                continue
            if found:
                self.reconciler.optional_kinds |= {kind}
                self.informers += [
                    Informer(self.client, self.store, kind, OURS, self._child_changed, scope)
                    for scope in self.settings.namespaces or (None,)
                ]

    def see(self, kind: Kind, obj: Object, deleted: bool) -> None:
        """Take up an object of our own kinds."""
        if deleted:
            self.store.remove(kind, obj)
        else:
            self.store.put(kind, obj)
        if kind == INFERENCE_SERVICE:
            self.services.add(key_of(obj))
        elif kind == MODEL_CACHE:
            self.cache_queue.add(key_of(obj))
            self._wake_namespace(obj["metadata"].get("namespace"))
        elif kind == SERVING_RUNTIME:
            self._wake_namespace(obj["metadata"].get("namespace"))
        elif kind == CLUSTER_SERVING_RUNTIME:
            self._wake_namespace(None)

    async def relist(self) -> None:
        """Look at every object of our own kinds anew: what a watch that went silent did not tell is taken up here.

        Raises `ApiError` of the first kind that could not be listed, after the others were.
        """
        failures = []
        for kind in OWN_KINDS:
            for scope in (self.settings.namespaces or (None,)) if kind.namespaced else (None,):
                try:
                    await self._relist_kind(kind, scope)
                except ApiError as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        self._listed_at = time.monotonic()

    async def _relist_kind(self, kind: Kind, scope: str | None) -> None:
        """What the watch told while the list was under way is newer than the list, and stays."""
        before = self._versions(kind, scope)
        answer = await self.client.list_objects(kind, scope)
        listed = {key_of(item): item for item in answer["items"]}
        now = self._versions(kind, scope)
        for key in now.keys() - listed.keys():
            obj = self.store.get(kind, *key)
            if obj is not None and before.get(key) == now[key]:
                self.see(kind, obj, deleted=True)
        for key, item in listed.items():
            if now.get(key) == before.get(key) != item["metadata"].get("resourceVersion"):
                self.see(kind, {"apiVersion": kind.api_version, "kind": kind.kind, **item}, deleted=False)

    def _versions(self, kind: Kind, scope: str | None) -> dict[Key, str]:
        """The version of every object of a kind (in a namespace) that is known."""
        known = {key_of(obj): str(obj["metadata"].get("resourceVersion")) for obj in self.store.all(kind)}
        return {key: version for key, version in known.items() if scope in (None, key[0])}

    async def _relist_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.relist_s)
            try:
                await self.relist()
            except ApiError as error:
                log.warning("resources could not be listed anew: %s", error)

    def silence_s(self) -> float:
        """Seconds since the API server last answered the most neglected of our questions, watches and lists alike."""
        listed = time.monotonic() - self._listed_at
        return max(listed, *(informer.silence_s() for informer in self.informers))

    def _child_changed(self, kind: Kind, obj: Object) -> None:
        labels = obj["metadata"].get("labels") or {}
        namespace = obj["metadata"].get("namespace") or ""
        if service := labels.get(SERVICE_LABEL):
            self.services.add((namespace, service))
        if cache := labels.get(CACHE_LABEL):
            self.cache_queue.add((namespace, cache))

    def _wake_namespace(self, namespace: str | None) -> None:
        for obj in self.store.all(INFERENCE_SERVICE):
            if namespace is None or obj["metadata"].get("namespace") == namespace:
                self.services.add(key_of(obj))
