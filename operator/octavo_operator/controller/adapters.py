"""The adapter loop: bring every ready replica to hold the LoRA adapters that its service wants."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping

import aiohttp

from octavo_operator.adapters import Action, AdapterView, Attempts, Holding, Step, adapter_steps, adapter_views
from octavo_operator.api.serving_runtime import AdapterApi
from octavo_operator.controller.bounded_read import read_up_to
from octavo_operator.controller.client import ApiError, KubeClient, Object
from octavo_operator.controller.kinds import POD
from octavo_operator.controller.reconciler import Reconciler
from octavo_operator.controller.replicas import replica_url
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Key, Store
from octavo_operator.render.labels import ADAPTERS_ANNOTATION, SERVICE_LABEL

log = logging.getLogger("octavo.operator.adapters")
LIST_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 120.0
MAX_ANSWER_BYTES = 1024 * 1024
MAX_MESSAGE = 300


class AdapterLoop:
    """Looks at every service with adapters each interval. `on_change` hears the keys whose adapters look different.

    What an engine holds is asked of the engine; what the operator loaded there is kept on the pod, where gateways
    read it too. Each service is tended by a task of its own, so a slow load holds up neither scaling nor others.
    """

    def __init__(
        self,
        client: KubeClient,
        reconciler: Reconciler,
        store: Store,
        settings: OperatorSettings,
        on_change: Callable[[Key], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._reconciler = reconciler
        self._store = store
        self._settings = settings
        self._on_change = on_change
        self._now = now
        self._attempts: dict[Key, Attempts] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Tend every service until cancelled."""
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
            while True:
                for key, state in list(self._reconciler.states.items()):
                    if self._concerns(key, state) and (key not in self._tasks or self._tasks[key].done()):
                        self._tasks[key] = group.create_task(self.tend(key, state, http))
                for gone in self._tasks.keys() - self._reconciler.states.keys():
                    self._tasks.pop(gone).cancel()
                    self._attempts.pop(gone, None)
                await asyncio.sleep(self._settings.scaling_interval_s)

    def _concerns(self, key: Key, state: ServiceState) -> bool:
        """Whether there is anything to load, or to unload because it is no longer wanted."""
        if not state.plan or not state.plan.workloads or state.plan.workloads[0].adapter_api is None:
            return bool(state.adapters)
        pods = self._store.labelled(POD, key[0], SERVICE_LABEL, key[1])
        return bool(state.plan.workloads[0].adapters) or any(self._ours(pod) for pod in pods)

    async def tend(self, key: Key, state: ServiceState, http: aiohttp.ClientSession) -> None:
        """One look at the replicas of a service, and every call that is due."""
        workload = state.plan.workloads[0] if state.plan and state.plan.workloads else None
        if workload is None or workload.adapter_api is None:
            self._tell(key, state, ())
            return
        api = workload.adapter_api
        attempts = self._attempts.setdefault(key, Attempts())
        ready = [pod.name for pod in self._reconciler.observe(key).ready]
        holdings = await self._holdings(key, ready, workload.port, api, http)
        steps = attempts.due(adapter_steps(workload.adapters, holdings.values()), self._now())
        by_replica = {name: [step for step in steps if step.replica == name] for name in holdings}
        state.adapters_loading = any(step.action is Action.LOAD for step in steps)
        try:
            await asyncio.gather(
                *(
                    self._take(key, holdings, todo, workload.port, api, attempts, http)
                    for todo in by_replica.values()
                    if todo
                )
            )
        finally:
            state.adapters_loading = False
        views = adapter_views(workload.adapters, list(holdings.values()), len(ready), attempts.failures)
        self._tell(key, state, views)

    def _tell(self, key: Key, state: ServiceState, views: tuple[AdapterView, ...]) -> None:
        if views != state.adapters:
            state.adapters = views
            self._on_change(key)

    async def _take(
        self,
        key: Key,
        holdings: dict[str, Holding],
        steps: Iterable[Step],
        port: int,
        api: AdapterApi,
        attempts: Attempts,
        http: aiohttp.ClientSession,
    ) -> None:
        """The steps of one replica, one after another; `holdings` is kept true."""
        stuck: set[str] = set()
        for step in steps:
            if step.name in stuck:
                continue  # its unload has just failed
            problem = await self._call(self._url(key, step.replica, port), step, api, http)
            if problem is not None:
                message, refused = problem
                attempts.failed(step, self._now(), message, refused=refused)
                stuck.add(step.name)
                log.warning("%s/%s: %s %s on %s: %s", *key, step.action.value, step.name, step.replica, message)
                continue
            attempts.succeeded(step)
            holding = holdings[step.replica] = _after(holdings[step.replica], step)
            await self._record(key, holding)
            log.info("%s/%s: %sed adapter %s on %s", *key, step.action.value, step.name, step.replica)

    async def _call(
        self, base: str, step: Step, api: AdapterApi, http: aiohttp.ClientSession
    ) -> tuple[str, bool] | None:
        """None if the engine did it; else why not, and whether it refused."""
        body = {"lora_name": step.name}
        if step.action is Action.LOAD:
            body["lora_path"] = step.path
        url = base + (api.load if step.action is Action.LOAD else api.unload)
        try:
            async with http.post(url, json=body, timeout=aiohttp.ClientTimeout(total=LOAD_TIMEOUT_S)) as answer:
                text = (await read_up_to(answer, MAX_ANSWER_BYTES)).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return str(error) or type(error).__name__, False
        if answer.status < 300 or (step.action is Action.UNLOAD and answer.status == 404):
            return None
        return f"{answer.status} {_error_message(text)}", 400 <= answer.status < 500 and answer.status not in (408, 429)

    async def _holdings(
        self, key: Key, ready: Iterable[str], port: int, api: AdapterApi, http: aiohttp.ClientSession
    ) -> dict[str, Holding]:
        """What each replica that answers holds."""
        names = list(ready)
        lists = await asyncio.gather(*(self._list(self._url(key, name, port) + api.list, http) for name in names))
        return {
            name: Holding(name, loaded, self._ours(self._store.get(POD, key[0], name)))
            for name, loaded in zip(names, lists, strict=True)
            if loaded is not None
        }

    async def _list(self, url: str, http: aiohttp.ClientSession) -> frozenset[str] | None:
        try:
            timeout = aiohttp.ClientTimeout(total=LIST_TIMEOUT_S)
            async with http.get(url, timeout=timeout) as answer:
                if answer.status != 200:
                    return None
                document = json.loads(await read_up_to(answer, MAX_ANSWER_BYTES))
            return frozenset(str(model["id"]) for model in document["data"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return None

    async def _record(self, key: Key, holding: Holding) -> None:
        """Note on the pod what was loaded there, for gateways and for the operator after a restart."""
        value = json.dumps(dict(holding.current), sort_keys=True) if holding.current else None
        patch = {"metadata": {"annotations": {ADAPTERS_ANNOTATION: value}}}
        try:
            self._store.put(POD, await self._client.patch(POD, key[0], holding.replica, patch))
        except ApiError as error:
            log.warning("pod %s/%s: its adapters could not be noted: %s", key[0], holding.replica, error)

    def _url(self, key: Key, replica: str, port: int) -> str:
        return replica_url(self._store.get(POD, key[0], replica), port)

    @staticmethod
    def _ours(pod: Object | None) -> Mapping[str, str]:
        text = ((pod or {}).get("metadata", {}).get("annotations") or {}).get(ADAPTERS_ANNOTATION)
        try:
            noted = json.loads(text) if text else {}
        except ValueError:
            return {}
        return {str(name): str(path) for name, path in noted.items()} if isinstance(noted, dict) else {}


def _after(holding: Holding, step: Step) -> Holding:
    """What the replica holds once the step is done."""
    ours = {name: path for name, path in holding.current.items() if name != step.name}
    if step.action is Action.UNLOAD:
        return Holding(holding.replica, holding.loaded - {step.name}, ours)
    return Holding(holding.replica, holding.loaded | {step.name}, {**ours, step.name: step.path})


def _error_message(text: str) -> str:
    """What an engine's error body says: OpenAI's shape, FastAPI's, or the text itself."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if isinstance(document, dict):
        error = document.get("error", document.get("detail", document))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return " ".join(text.split())[:MAX_MESSAGE]
