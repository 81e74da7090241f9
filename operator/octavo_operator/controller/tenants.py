"""The tenant loop: ask every gateway how it read the tenants, and say so in their status."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

import aiohttp

from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.inference_tenant import InferenceTenant
from octavo_operator.api.validation import parse
from octavo_operator.controller.bounded_read import read_up_to
from octavo_operator.controller.client import ApiError, KubeClient, Object
from octavo_operator.controller.kinds import INFERENCE_TENANT, POD
from octavo_operator.controller.replicas import GATEWAY_PORT, can_be_reached, replica_url
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.store import Store
from octavo_operator.render.labels import COMPONENT
from octavo_operator.tenant_status import GatewayTenants, read_gateway, tenant_status

log = logging.getLogger("octavo.operator.tenants")
INTERVAL_S = 10.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024


class TenantLoop:
    """The only writer of the status of tenants. The operator cannot read keys; what counts is what gateways use."""

    def __init__(
        self,
        client: KubeClient,
        store: Store,
        settings: OperatorSettings,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._store = store
        self._settings = settings
        self._now = now

    async def run(self) -> None:
        """Look every ten seconds until cancelled."""
        async with aiohttp.ClientSession() as http:
            while True:
                await self.look(http)
                await asyncio.sleep(INTERVAL_S)

    async def look(self, http: aiohttp.ClientSession) -> None:
        """One look at every tenant."""
        tenants = self._store.all(INFERENCE_TENANT)
        if not tenants:
            return
        pods = list(self._store.labelled(POD, self._settings.own_namespace, COMPONENT, "gateway"))
        asked = await asyncio.gather(*(self._ask(pod, http) for pod in pods if can_be_reached(pod)))
        answers = [answer for answer in asked if answer is not None]
        for raw in tenants:
            await self._write(raw, len(pods), answers)

    async def _write(self, raw: Object, gateways: int, answers: list[GatewayTenants]) -> None:
        name = raw["metadata"]["name"]
        try:
            status = tenant_status(parse(InferenceTenant, raw), gateways, answers, self._now())
            if status != raw.get("status"):
                self._store.put(INFERENCE_TENANT, await self._client.patch_status(INFERENCE_TENANT, None, name, status))
        except ManifestErrors as wrong:
            log.warning("InferenceTenant %s is not valid: %s", name, wrong)
        except ApiError as error:
            if not error.is_missing:
                log.warning("InferenceTenant %s: its status could not be written: %s", name, error)

    async def _ask(self, pod: Object, http: aiohttp.ClientSession) -> GatewayTenants | None:
        timeout = aiohttp.ClientTimeout(total=self._settings.scrape_timeout_s)
        try:
            async with http.get(f"{replica_url(pod, GATEWAY_PORT)}/tenants", timeout=timeout) as answer:
                if answer.status != 200:
                    return None
                return read_gateway(json.loads(await read_up_to(answer, MAX_ANSWER_BYTES)))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
