"""The validating webhook: every operator answers, the leader or not. It reads when asked, and writes nothing."""

from __future__ import annotations

import json
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from octavo_operator.admission import Verdict, answer, concerns_spec, review
from octavo_operator.api.errors import ManifestErrors, OctavoOperatorError
from octavo_operator.api.model import ModelSpec
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.api.serving_runtime import ClusterServingRuntime, ServingRuntime
from octavo_operator.api.validation import parse
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.hub import HubFacts, repository
from octavo_operator.controller.kinds import CLUSTER_SERVING_RUNTIME, MODEL_CACHE, SERVING_RUNTIME
from octavo_operator.controller.readable import model_claims, readable
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.desired import Runtime
from octavo_operator.plan import Facts
from octavo_operator.plan.values import ModelFacts

log = logging.getLogger("octavo.operator.webhook")
PATH = "/validate"
MAX_REVIEW_BYTES = 4 * 1024 * 1024


class WebhookUnusable(OctavoOperatorError):  # noqa: N818
    """The webhook cannot be served: no certificate, or no port."""


class Webhook:
    """Serves AdmissionReviews over TLS. Where it cannot decide it answers 500, and the configuration's failurePolicy
    decides."""

    def __init__(self, client: KubeClient, settings: OperatorSettings) -> None:
        self._client = client
        self._settings = settings
        self._hub = HubFacts(settings.hub_endpoint)
        self._runner: web.AppRunner | None = None
        self._http: aiohttp.ClientSession | None = None
        self.port = settings.webhook_port or 0

    async def start(self) -> None:
        """Listen. Raises `WebhookUnusable`."""
        folder = Path(self._settings.webhook_cert_dir)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        except (OSError, ssl.SSLError) as error:
            raise WebhookUnusable(f"no certificate in {folder} (tls.crt, tls.key): {error}") from error
        self._http = aiohttp.ClientSession()
        app = web.Application(client_max_size=MAX_REVIEW_BYTES)
        app.router.add_post(PATH, self._serve)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "0.0.0.0", self.port, ssl_context=tls).start()
        except OSError as error:
            message = f"port {self.port} cannot be used for the webhook: {error.strerror}"
            raise WebhookUnusable(f"{message}; choose another with --webhook-port") from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Finish what runs."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._http is not None:
            await self._http.close()

    async def _serve(self, http_request: web.Request) -> web.Response:
        try:
            request = (await http_request.json())["request"]
            document = request.get("object") or {}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise web.HTTPBadRequest(text="expected an AdmissionReview") from None
        verdict = await self._decide(document) if concerns_spec(request) else Verdict(True)
        if not verdict.allowed:
            name, namespace = request.get("name"), request.get("namespace")
            log.info("webhook: InferenceService %s/%s is refused: %s", namespace, name, verdict.message)
        return web.json_response(answer(request, verdict))

    async def _decide(self, document: Mapping[str, Any]) -> Verdict:
        namespace = str((document.get("metadata") or {}).get("namespace") or "default")
        caches = await self._list(MODEL_CACHE, namespace)
        facts = Facts(
            engine_image=self._settings.engine_image,
            model_claims=model_claims(readable(ModelCache, caches)),
            model=await self._model_facts(document),
        )
        return review(document, await self._runtimes(namespace), facts)

    async def _runtimes(self, namespace: str) -> list[Runtime]:
        own = await self._list(SERVING_RUNTIME, namespace)
        shared = await self._list(CLUSTER_SERVING_RUNTIME, None)
        return [*readable(ServingRuntime, own), *readable(ClusterServingRuntime, shared)]

    async def _list(self, kind: Kind, namespace: str | None) -> list[dict[str, Any]]:
        items = (await self._client.list_objects(kind, namespace))["items"]
        return [{"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in items]

    async def _model_facts(self, document: Mapping[str, Any]) -> ModelFacts:
        """What the hub says; a model that it does not tell of is not judged."""
        try:
            name = repository(parse(ModelSpec, document["spec"]["model"]))
        except (ManifestErrors, KeyError, TypeError):
            return ModelFacts()
        if name is None or not self._settings.hub_endpoint or self._http is None:
            return ModelFacts()
        return await self._hub.ask(name, self._http)
