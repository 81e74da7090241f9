"""Everything that works while this operator leads: the store, its watches, the queues, the scaling loop."""

from __future__ import annotations

import asyncio
import logging

from octavo_operator.controller.adapters import AdapterLoop
from octavo_operator.controller.client import ApiError, Kind, KubeClient, Object
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.informer import Informer
from octavo_operator.controller.kinds import (
    CHILDREN,
    CLUSTER_SERVING_RUNTIME,
    INFERENCE_SERVICE,
    MODEL_CACHE,
    POD,
    SERVING_RUNTIME,
)
from octavo_operator.controller.model_caches import ModelCacheReconciler
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.scaling import ScalingLoop
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Key, Store, key_of
from octavo_operator.controller.work_queue import WorkQueue
from octavo_operator.render.labels import MANAGED_BY, MANAGER, PART_OF, SERVICE_LABEL
from octavo_operator.render.model_cache import CACHE_LABEL

log = logging.getLogger("octavo.operator")
OWN_KINDS = (INFERENCE_SERVICE, SERVING_RUNTIME, CLUSTER_SERVING_RUNTIME, MODEL_CACHE)
OURS = f"{MANAGED_BY}={MANAGER}"
PODS = f"{PART_OF}=octavo"


class EngineRoom:
    """Created and run within the loop of kopf. `see` is called by kopf's handlers with every object of our kinds."""

    def __init__(self, client: KubeClient, settings: OperatorSettings) -> None:
        self.settings = settings
        self.client = client
        self.store = Store()
        events = EventRecorder(client)
        self.reconciler = Reconciler(client, self.store, events, settings)
        self.caches = ModelCacheReconciler(client, self.store, events, settings)
        self.services: WorkQueue[Key] = WorkQueue(self.reconciler.reconcile, settings.workers)
        self.cache_queue: WorkQueue[Key] = WorkQueue(self.caches.reconcile, 1)
        self.scaling = ScalingLoop(client, self.reconciler, self.store, settings, self.services.add)
        self.adapters = AdapterLoop(client, self.reconciler, self.store, settings, self.services.add)
        scopes: tuple[str | None, ...] = settings.namespaces or (None,)
        self.informers = [
            Informer(client, self.store, kind, OURS, self._child_changed, scope)
            for kind in CHILDREN
            for scope in scopes
        ]
        pod_scopes = scopes if None in scopes else tuple({*scopes, settings.own_namespace})
        self.informers += [Informer(client, self.store, POD, PODS, self._child_changed, s) for s in pod_scopes]

    async def run(self) -> None:
        """Work until cancelled. Nothing is written before every watch has listed once."""
        async with asyncio.TaskGroup() as group:
            for informer in self.informers:
                group.create_task(informer.run())
            for informer in self.informers:
                await informer.synced.wait()
            log.info("watching; reconciling begins")
            group.create_task(self.services.run())
            group.create_task(self.cache_queue.run())
            group.create_task(self.scaling.run())
            group.create_task(self.adapters.run())
            group.create_task(self._relist_forever())

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
        """Look at every object of our own kinds anew: what a watch that went silent did not tell is taken up here."""
        for kind in OWN_KINDS:
            for scope in (self.settings.namespaces or (None,)) if kind.namespaced else (None,):
                answer = await self.client.list_objects(kind, scope)
                items = [{"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in answer["items"]]
                known = {key_of(obj): obj["metadata"].get("resourceVersion") for obj in self.store.all(kind)}
                for gone in self.store.replace(kind, items, scope):
                    self.see(kind, gone, deleted=True)
                for obj in items:
                    if known.get(key_of(obj)) != obj["metadata"].get("resourceVersion"):
                        self.see(kind, obj, deleted=False)

    async def _relist_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync_s)
            try:
                await self.relist()
            except ApiError as error:
                log.warning("resources could not be listed anew: %s", error)

    def silence_s(self) -> float:
        """Seconds since the most silent watch last heard of the API server."""
        return max((informer.silence_s() for informer in self.informers), default=0.0)

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
