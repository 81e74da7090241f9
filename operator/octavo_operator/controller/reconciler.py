"""Bring one InferenceService to its wanted state: plan, render, compare, write what differs, say what is seen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from opentelemetry.trace import Tracer

from octavo_operator.api.errors import FieldError, ManifestErrors
from octavo_operator.api.inference_service import InferenceService, InferenceServiceSpec
from octavo_operator.api.kubernetes import ObjectMeta
from octavo_operator.api.model import ModelSpec
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.api.serving_runtime import ClusterServingRuntime, ServingRuntime
from octavo_operator.api.validation import parse
from octavo_operator.canary import Phase, advance, canary_weight, news, split_replicas
from octavo_operator.canary_meter import trial_view
from octavo_operator.controller.client import ApiError, Kind, KubeClient, Object
from octavo_operator.controller.events import EventRecorder
from octavo_operator.controller.hub import HubFacts
from octavo_operator.controller.kinds import (
    CHILDREN,
    CLUSTER_SERVING_RUNTIME,
    CONTROLLER_REVISION,
    DEPLOYMENT,
    INFERENCE_SERVICE,
    LEADER_WORKER_SET,
    MODEL_CACHE,
    POD,
    SERVING_RUNTIME,
    STATEFUL_SET,
    kind_of,
)
from octavo_operator.controller.readable import model_claims, readable
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Key, Store
from octavo_operator.controller.tracing import NO_TRACER
from octavo_operator.desired import Runtime, with_presets
from octavo_operator.diff import reconcile, stamped
from octavo_operator.groups import group_views, groups_deployment, groups_to_recreate, newest_hashes
from octavo_operator.judgement import Judgement
from octavo_operator.observation import Observation, deployment_view, observe, split_pods
from octavo_operator.plan import Facts, Plan, Unplannable, plan
from octavo_operator.plan.runtime import choose_runtime
from octavo_operator.plan.values import ModelFacts, Workload
from octavo_operator.render import CanaryRender, Owner, render_plan
from octavo_operator.render.deployment import Kept, canary_name, kept_name
from octavo_operator.render.groups import nodes_name
from octavo_operator.render.labels import SERVICE_LABEL
from octavo_operator.render.pod import pod_template
from octavo_operator.render.revision import revision_of, template_revision
from octavo_operator.status import Status, restored_trial, service_status, without_change

log = logging.getLogger("octavo.operator")
SCALING_STATUS_EVERY_S = 30.0
BENIGN = frozenset({"ReplicasNotReady", "Suspended", "WaitingForModelCache"})  # not ready, but nothing is wrong


class Reconciler:
    """Reconciles services from the store; the only writer of what they own and of their status."""

    def __init__(
        self,
        client: KubeClient,
        store: Store,
        events: EventRecorder,
        settings: OperatorSettings,
        now: Callable[[], float] = time.time,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._client = client
        self._tracer = tracer
        self._store = store
        self._events = events
        self._settings = settings
        self._now = now
        self.states: dict[Key, ServiceState] = {}
        self.hub = HubFacts(settings.hub_endpoint, now)
        self.optional_kinds: frozenset[Kind] = frozenset()  # of those that a cluster need not have, the ones it has

    async def reconcile(self, key: Key) -> float | None:
        """One look at a service. Returns after how many seconds to look again; raises `ApiError` to be retried."""
        names = {"k8s.namespace.name": key[0], "octavo.inference_service": key[1]}
        with self._tracer.start_as_current_span("reconcile InferenceService", attributes=names) as span:
            before = self._client.writes
            again = await self._reconcile(key)
            span.set_attribute("octavo.writes", self._client.writes - before)
            return again

    async def _reconcile(self, key: Key) -> float | None:
        namespace, name = key
        raw = self._store.get(INFERENCE_SERVICE, namespace, name)
        if raw is None or raw["metadata"].get("deletionTimestamp"):
            self.states.pop(key, None)
            return None
        try:
            service = parse(InferenceService, raw)
        except ManifestErrors as wrong:
            await self._refuse_unreadable(raw, wrong)
            return None
        state = self.states.get(key)
        if state is None:
            state = self.states[key] = ServiceState(status_written=self._now(), trial=restored_trial(service))
        refusal: Unplannable | None = None
        apply_error = ""
        failure: ApiError | None = None
        runtime_kind = "ClusterServingRuntime"
        try:
            state.plan, runtime_kind = self.plan(service)
            apply_error = await self._apply(raw, service, state)
        except Unplannable as error:
            state.plan, refusal = None, error
        except ApiError as error:  # tried again later, but never in silence
            failure, apply_error = error, str(error)
        judgement = Judgement(
            service=service,
            plan=state.plan,
            refusal=refusal,
            observation=self.observe(key),
            now=self._now(),
            gateway_url=self._settings.gateway_url,
            decision=state.decision,
            apply_error=apply_error,
            runtime_kind=runtime_kind,
            scalings=state.scalings,
            route=state.route,
            capacity=state.capacity,
            revision=state.revision,
            adapters=state.adapters,
            trial=state.trial,
            wanted=state.wanted,
        )
        await self._write_status(raw, service_status(judgement), state)
        if failure is not None:
            raise failure
        on_trial = state.trial is not None and state.trial.phase is not Phase.ROLLED_BACK
        soon = on_trial or bool(state.groups.torn_since) or (state.plan is not None and self._is_rolling_groups(key))
        return self._settings.scaling_interval_s if soon else self._settings.resync_s

    def _is_rolling_groups(self, key: Key) -> bool:
        """Whether groups are being replaced: which one is next is for the operator to see."""
        deployment = self.observe(key).deployment if self._stateful_sets(key) else None
        return deployment is not None and deployment.rolling

    def plan(self, service: InferenceService) -> tuple[Plan, str]:
        """The plan of a service and the kind of its runtime. Raises `Unplannable`."""
        runtime = choose_runtime(service, with_presets(self._runtimes()))
        facts = Facts(
            engine_image=self._settings.engine_image,
            model_claims=model_claims(readable(ModelCache, self._caches(service.namespace))),
            leader_worker_set=LEADER_WORKER_SET in self.optional_kinds,
            model=self._model_facts(service),
        )
        return plan(service, runtime, facts), runtime.kind

    def _model_facts(self, service: InferenceService) -> ModelFacts:
        """What the hub says of the model; it is not asked once a replica was measured, which says more."""
        measured = service.status.capacity if service.status else None
        if measured is not None and measured.kv_tokens_per_replica is not None:
            return ModelFacts(unknown="a replica was measured instead")
        return self.hub.facts(service.spec.model, (service.namespace, service.name))

    def observe(self, key: Key) -> Observation:
        """What is seen of a service."""
        namespace, name = key
        pods = self._store.labelled(POD, namespace, SERVICE_LABEL, name)
        deployment, canary = (self._store.get(DEPLOYMENT, namespace, found) for found in (name, canary_name(name)))
        if deployment is None and (sets := self._stateful_sets(key)):
            replicas, workers = split_pods(pods)
            view = groups_deployment(sets, group_views((*replicas, *workers), newest_hashes(sets)))
            return Observation(view, replicas, workers=workers)
        if deployment is None:
            deployment = self._store.get(LEADER_WORKER_SET, namespace, nodes_name(name))
        return observe(deployment, pods, canary)

    def _stateful_sets(self, key: Key) -> list[Object]:
        return list(self._store.labelled(STATEFUL_SET, key[0], SERVICE_LABEL, key[1]))

    async def _apply(self, raw: Object, service: InferenceService, state: ServiceState) -> str:
        """Write what differs. Returns why the API server refused an object, if it did."""
        if state.plan is None or (state.plan.waiting_for and not self._exists(service)):
            return ""
        owner = Owner(raw["kind"], service.name, raw["metadata"]["uid"])
        state.wanted = self._replicas(service, state)
        replicas, canary = self._try_out(service, state, state.plan.workloads[0])
        rendered = render_plan(state.plan, owner, replicas, canary)
        state.revision = revision_of(rendered)
        desired = stamped(rendered)
        changes = reconcile(desired, self._observed(service), owner.uid)
        for obj in changes.apply:
            kind = kind_of(obj)
            try:
                self._keep(kind, await self._client.apply(kind, obj))
            except ApiError as error:
                if kind.kind == "PodMonitor" and error.is_missing:
                    return "spec.observability.podMonitor: the Prometheus operator's PodMonitor is not installed"
                if not error.is_refusal:
                    raise
                return f"{obj['kind']} {obj['metadata']['name']}: {error.message}"
            log.info("applied %s %s/%s", obj["kind"], service.namespace, obj["metadata"]["name"])
        for obj in changes.delete:
            metadata = obj["metadata"]
            await self._client.delete(kind_of(obj), metadata.get("namespace"), metadata["name"], metadata.get("uid"))
            log.info("deleted %s %s/%s", obj["kind"], service.namespace, metadata["name"])
        await self._recreate_groups((service.namespace, service.name), state)
        return ""

    async def _recreate_groups(self, key: Key, state: ServiceState) -> None:
        """Delete the pods of groups that are torn or outdated; their StatefulSets make them anew."""
        sets = self._stateful_sets(key)
        if not sets or state.plan is None:
            return
        observation = self.observe(key)
        groups = group_views((*observation.pods, *observation.workers), newest_hashes(sets))
        most = state.plan.workloads[0].rollout.max_unavailable
        for group in groups_to_recreate(groups, most, state.groups, self._now()):
            why = "outdated" if group.outdated else "torn: a part of its nodes has restarted"
            log.info("%s/%s: group %s is made anew: %s", *key, group.index, why)
            for pod in group.members:
                if not pod.deleting:
                    await self._client.delete(POD, key[0], pod.name)

    def _try_out(
        self, service: InferenceService, state: ServiceState, workload: Workload
    ) -> tuple[int, CanaryRender | None]:
        """(replicas of the service's own Deployment, the revision on trial beside it)."""
        key, canary = (service.namespace, service.name), service.spec.rollout.canary
        replicas = workload.replicas.initial if state.wanted is None else state.wanted
        before, state.trial = state.trial, None
        if canary is not None:
            wanted = template_revision(pod_template(workload))
            view = trial_view(self.observe(key), wanted, replicas, state.meter)
            state.trial = advance(before, view, canary, self._now())
        if told := news(before, state.trial, canary):
            state.untold = (*state.untold, told)
        if canary is None or state.trial is None:
            return replicas, None
        own, on_trial = split_replicas(state.trial, canary, replicas)
        kept = None if state.trial.phase is Phase.PROMOTING else self._kept(key)
        return own, CanaryRender(canary_weight(state.trial, canary), on_trial, kept)

    def _kept(self, key: Key) -> Kept:
        """The template that serves: as it was remembered when the trial began, else as it runs now."""
        running = self._store.get(DEPLOYMENT, *key) or {}
        revision = deployment_view(running).revision
        remembered = self._store.get(CONTROLLER_REVISION, key[0], kept_name(key[1], revision))
        template = remembered["data"]["template"] if remembered else running["spec"]["template"]
        about = {name: value for name, value in template["metadata"].items() if name != "creationTimestamp"}
        return Kept(revision, {**template, "metadata": about})

    def _keep(self, kind: Kind, applied: Object) -> None:
        """Take up what the server answered, so that the next look does not write again before the watch tells."""
        if kind in CHILDREN or kind in self.optional_kinds:
            self._store.put(kind, applied)

    def _replicas(self, service: InferenceService, state: ServiceState) -> int | None:
        """The number to apply: the autoscaler's, else what runs now within the bounds, else the plan's first."""
        if state.plan is None or not state.plan.workloads:
            return None
        workload = state.plan.workloads[0]
        if not workload.scaling.scales:
            return workload.replicas.initial
        if state.replicas is not None:
            return state.replicas
        existing = self.observe((service.namespace, service.name)).deployment
        if existing is None:
            return workload.replicas.initial
        current = existing.wanted
        if state.trial is not None:  # its Deployment has only a part of them
            current = state.wanted or (service.status.desired_replicas if service.status else current)
        return min(max(current, workload.replicas.min), workload.replicas.max)

    def _observed(self, service: InferenceService) -> Iterator[Object]:
        for kind in (*CHILDREN, *self.optional_kinds):
            for obj in self._store.labelled(kind, service.namespace, SERVICE_LABEL, service.name):
                yield {"apiVersion": kind.api_version, "kind": kind.kind, **obj}

    def _exists(self, service: InferenceService) -> bool:
        return self.observe((service.namespace, service.name)).deployment is not None

    def _runtimes(self) -> Iterator[Runtime]:
        """Every readable runtime; one that is not valid is left out and told in the log."""
        yield from readable(ServingRuntime, self._store.all(SERVING_RUNTIME))
        yield from readable(ClusterServingRuntime, self._store.all(CLUSTER_SERVING_RUNTIME))

    def _caches(self, namespace: str) -> Iterator[Object]:
        return (raw for raw in self._store.all(MODEL_CACHE) if raw["metadata"].get("namespace") == namespace)

    async def _refuse_unreadable(self, raw: Object, wrong: ManifestErrors) -> None:
        """A spec that this version cannot read, such as one stored under an older CRD: say so, change nothing."""
        metadata = raw["metadata"]
        key = (metadata.get("namespace") or "", metadata["name"])
        refusal = Unplannable("InvalidSpec", [FieldError(e.path, e.message, e.value) for e in wrong.errors])
        judgement = Judgement(_unreadable(raw), None, refusal, self.observe(key), self._now())
        await self._write_status(raw, service_status(judgement), self.states.setdefault(key, ServiceState()))

    async def _write_status(self, raw: Object, status: Status, state: ServiceState) -> None:
        old = raw.get("status")
        now = self._now()
        if without_change(old, status):
            stale = now - state.status_written >= SCALING_STATUS_EVERY_S
            if all((old or {}).get(part) == status.get(part) for part in ("scaling", "capacity")) or not stale:
                return
        metadata = raw["metadata"]
        try:
            answer = await self._client.patch_status(
                INFERENCE_SERVICE, metadata.get("namespace"), metadata["name"], status
            )
        except ApiError as error:
            if error.is_missing:
                return  # deleted meanwhile
            raise
        self._store.put(INFERENCE_SERVICE, answer)
        state.status_written = now
        await self._tell(raw, status, state)

    async def _tell(self, raw: Object, status: Status, state: ServiceState) -> None:
        """An Event for every aspect that changed for people: became ready, broke, or was scaled."""
        for scaling in reversed(state.scalings[: state.untold_scalings]):
            await self._events.tell(raw, "Scaled", scaling.reason)
        state.untold_scalings = 0
        for item in state.untold:
            await self._events.tell(raw, item.reason, item.message, warning=item.warning)
        state.untold = ()
        for condition in status["conditions"]:
            type_, told = condition["type"], (condition["status"], condition["reason"])
            if type_ not in ("Ready", "RuntimeResolved", "Degraded") or state.conditions.get(type_) == told:
                continue
            first = type_ not in state.conditions
            state.conditions[type_] = told
            bad = (condition["status"] == "True") == (type_ == "Degraded")
            if first and not bad:
                continue
            note = condition["message"] or f"{type_} is {condition['status']}"
            await self._events.tell(raw, condition["reason"], note, warning=bad and told[1] not in BENIGN)


def _unreadable(raw: Object) -> InferenceService:
    """A stand-in for a service whose spec cannot be read: its name is known, its wishes are not."""
    metadata = raw["metadata"]
    return InferenceService.model_construct(
        metadata=ObjectMeta.model_construct(
            name=metadata["name"], namespace=metadata.get("namespace"), generation=metadata.get("generation")
        ),
        spec=InferenceServiceSpec(model=ModelSpec(storage_uri="")),
        status=None,
    )
