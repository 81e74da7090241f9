"""The scaling loop: scrape replicas and gateways, decide for each service, hand the number to the reconciler."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median

import aiohttp
from opentelemetry.trace import Tracer

from octavo_operator.autoscale.decide import Decision, decide
from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.metrics import Page, parse_page
from octavo_operator.autoscale.observer import Observer
from octavo_operator.autoscale.signals import ReplicaSample
from octavo_operator.canary_meter import TRACK_METRICS
from octavo_operator.controller.bounded_read import read_up_to
from octavo_operator.controller.client import ApiError, KubeClient
from octavo_operator.controller.kinds import INFERENCE_SERVICE, POD
from octavo_operator.controller.reconciler import SCALING_STATUS_EVERY_S, Reconciler
from octavo_operator.controller.replicas import GATEWAY_PORT, can_be_reached, replica_url
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Key, Store
from octavo_operator.controller.tracing import NO_TRACER
from octavo_operator.judgement import Scaling
from octavo_operator.observation import DeploymentView, Observation
from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import COMPONENT
from octavo_operator.routes import KNOWN_MODELS, route_view
from octavo_operator.status import start_seconds

log = logging.getLogger("octavo.operator.scaling")
MAX_PAGE_BYTES = 4 * 1024 * 1024
HELD, ARRIVALS = "octavo_gateway_requests_held", "octavo_gateway_arrivals_total"
GATEWAY_METRICS = (HELD, ARRIVALS, KNOWN_MODELS, TRACK_METRICS)  # what is read of a gateway's page, which is long
MAX_GATEWAY_PAGE_BYTES = 32 * 1024 * 1024
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"


class ScalingLoop:
    """One decision per service and interval. `on_decision` hears the keys whose decision is new."""

    def __init__(
        self,
        client: KubeClient,
        reconciler: Reconciler,
        store: Store,
        settings: OperatorSettings,
        on_decision: Callable[[Key], None],
        now: Callable[[], float] = time.time,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._client = client
        self._tracer = tracer
        self._reconciler = reconciler
        self._store = store
        self._settings = settings
        self._on_decision = on_decision
        self._now = now
        self._observers: dict[Key, Observer] = {}
        self._histories: dict[Key, History] = {}
        self._limit = asyncio.Semaphore(settings.scrape_concurrency)
        self.last_round_s = 0.0

    async def run(self) -> None:
        """Decide every interval until cancelled."""
        async with aiohttp.ClientSession() as http:
            while True:
                began = time.monotonic()
                await self.round(http)
                self.last_round_s = time.monotonic() - began
                await asyncio.sleep(max(0.1, self._settings.scaling_interval_s - self.last_round_s))

    async def round(self, http: aiohttp.ClientSession) -> None:
        """One look at every service, and one decision for each that this operator scales."""
        keys = {key: state for key, state in self._reconciler.states.items() if state.plan and state.plan.workloads}
        for gone in (self._observers.keys() | self._histories.keys()) - keys.keys():
            self._observers.pop(gone, None)
            self._histories.pop(gone, None)
        gateways = await self._gateway_pages(http)
        await asyncio.gather(*(self._look(key, state, http, gateways) for key, state in keys.items()))

    async def _look(self, key: Key, state: ServiceState, http: aiohttp.ClientSession, gateways: Gateways) -> None:
        if state.plan is None:
            return
        workload = state.plan.workloads[0]
        route = route_view(gateways.pages, gateways.count, workload.model_name, workload.namespace)
        news, state.route = route != state.route, route
        if state.trial is not None:
            state.meter.begin(state.trial.revision, state.trial.step)
            state.meter.add(gateways.by_pod, workload.model_name, workload.namespace)
        observation = self._reconciler.observe(key)
        if observation.deployment is not None:
            observer = self._observer(key, workload, state.revision)
            await self._scrape(observer, observation, workload, key, http)
            state.capacity = observer.capacity()
            if workload.scaling.scales:
                news |= await self._decide(key, state, workload, observation, observer, gateways.pages)
        moved = _told(state) != state.told_numbers
        if news or (moved and self._now() - state.status_written >= SCALING_STATUS_EVERY_S):
            state.told_numbers = _told(state)
            self._on_decision(key)

    def _observer(self, key: Key, workload: Workload, revision: str) -> Observer:
        """The service's observer; a new revision of its pods is measured anew."""
        known = self._observers.get(key)
        if known is None or known.revision != revision:
            known = self._observers[key] = Observer(workload.metrics, self._now(), revision)
        return known

    async def _decide(
        self,
        key: Key,
        state: ServiceState,
        workload: Workload,
        observation: Observation,
        observer: Observer,
        gateways: list[Page],
    ) -> bool:
        """Decide the number of replicas; whether that says something new."""
        now = self._now()
        deployment = observation.deployment
        held, arrivals = gateway_signals(gateways, workload)
        times = start_seconds(observation.pods)
        signals = observer.signals(
            current=_wanted(state, deployment),
            ready=[pod.name for pod in observation.ready],
            pending=len(observation.pending),
            unschedulable=len(observation.unschedulable),
            now=now,
            held=held,
            arrivals=arrivals,
            changing=bool(deployment and deployment.rolling) or state.adapters_loading,
            cold_start_s=median(times) if times else None,
        )
        history = self._histories.get(key) or self._restore(key, now)
        decision = decide(signals, workload.scaling, history, now)
        self._histories[key] = decision.history
        if decision.replicas != signals.current:
            log.info("%s/%s: %s", *key, decision.message)
            state.scaled(Scaling(now, signals.current, decision.replicas, decision.message))
            with self._tracer.start_as_current_span("scale InferenceService", attributes=_scale_facts(key, decision)):
                if decision.replicas < signals.current:
                    await self._price_pods(key, signals.samples)
        news = _is_news(state.decision, decision) or decision.replicas != signals.current
        state.decision, state.replicas = decision, decision.replicas
        return news

    async def _price_pods(self, key: Key, samples: Iterable[ReplicaSample]) -> None:
        """Tell the ReplicaSet which replicas to spare: the more requests, the dearer. It deletes the cheapest first."""
        for sample in samples:
            price = {"metadata": {"annotations": {DELETION_COST: str(round(sample.running + sample.waiting))}}}
            try:
                await self._client.patch(POD, key[0], sample.name, price)
            except ApiError as error:
                log.info("pod %s/%s keeps its deletion cost: %s", key[0], sample.name, error)

    def _restore(self, key: Key, now: float) -> History:
        raw = self._store.get(INFERENCE_SERVICE, *key) or {}
        learned = ((raw.get("status") or {}).get("scaling") or {}).get("learned") or {}
        return History.restore(learned, now)

    async def _scrape(
        self, observer: Observer, observation: Observation, workload: Workload, key: Key, http: aiohttp.ClientSession
    ) -> None:
        port = workload.metrics.port or workload.port
        names = [pod.name for pod in observation.ready]
        urls = (replica_url(self._store.get(POD, key[0], name), port) + workload.metrics.path for name in names)
        pages = await asyncio.gather(*(self._page(http, url) for url in urls))
        for name, text in zip(names, pages, strict=True):
            if text is not None:
                observer.add_page(name, text, self._now())

    async def _gateway_pages(self, http: aiohttp.ClientSession) -> Gateways:
        """Metrics of every gateway of the installation; one that does not answer is left out this time."""
        pods = self._store.labelled(POD, self._settings.own_namespace, COMPONENT, "gateway")
        urls = {p["metadata"]["name"]: f"{replica_url(p, GATEWAY_PORT)}/metrics" for p in pods if can_be_reached(p)}
        texts = await asyncio.gather(*(self._page(http, url, MAX_GATEWAY_PAGE_BYTES) for url in urls.values()))
        now = self._now()
        answers = {
            name: parse_page(text, now, GATEWAY_METRICS)
            for name, text in zip(urls, texts, strict=True)
            if text is not None
        }
        return Gateways(len(urls), answers)

    async def _page(self, http: aiohttp.ClientSession, url: str, limit: int = MAX_PAGE_BYTES) -> str | None:
        """A metrics page; None when the replica does not answer in time."""
        timeout = aiohttp.ClientTimeout(total=self._settings.scrape_timeout_s)
        async with self._limit:
            try:
                async with http.get(url, timeout=timeout) as answer:
                    if answer.status != 200:
                        return None
                    body = await read_up_to(answer, limit)
                    return body.decode(errors="replace")
            except (aiohttp.ClientError, TimeoutError, OSError):
                return None


@dataclass(frozen=True)
class Gateways:
    """How many gateways there are, and the pages of those that answered, by pod."""

    count: int
    by_pod: dict[str, Page]

    @property
    def pages(self) -> list[Page]:
        return list(self.by_pod.values())


def _scale_facts(key: Key, decision: Decision) -> dict[str, str | int]:
    """What a trace says of a decision."""
    return {
        "k8s.namespace.name": key[0],
        "octavo.inference_service": key[1],
        "octavo.replicas": decision.replicas,
        "octavo.reason": decision.message,
    }


def _wanted(state: ServiceState, deployment: DeploymentView | None) -> int:
    """Replicas that the service wants now; while a revision is on trial, its Deployment has only a part of them."""
    if state.trial is not None and state.wanted is not None:
        return state.wanted
    return deployment.wanted if deployment else 0


def _is_news(before: Decision | None, now: Decision) -> bool:
    """Whether a decision says something new, beyond numbers that always move."""
    return before is None or (before.replicas, before.frozen, before.guard) != (now.replicas, now.frozen, now.guard)


def _told(state: ServiceState) -> tuple[object, ...]:
    """What of decision and capacity is shown in the status."""
    decision = state.decision
    if decision is None:
        return (state.capacity,)
    kv = None if decision.kv_utilization is None else round(decision.kv_utilization, 2)
    numbers = (decision.message, kv, decision.kv_desired, decision.load_desired, decision.history.persisted())
    return (state.capacity, *numbers)


def gateway_signals(pages: Iterable[Page], workload: Workload) -> tuple[int, float | None]:
    """(held requests, arrivals ever) of a service over all gateways; arrivals None when no gateway knows it."""
    held, arrivals, known = 0.0, 0.0, False
    for page in pages:
        held += sum(_values(page, HELD, workload))
        counted = list(_values(page, ARRIVALS, workload))
        arrivals += sum(counted)
        known = known or bool(counted)
    return round(held), arrivals if known else None


def _values(page: Page, name: str, workload: Workload) -> Iterator[float]:
    for sample in page.of_model(name, workload.model_name):
        if sample.labels.get("namespace") == workload.namespace:
            yield sample.value
