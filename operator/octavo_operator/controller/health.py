"""Health and metrics of the operator over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from octavo_operator.api.errors import OctavoOperatorError
from octavo_operator.controller.metrics import OperatorCollector
from octavo_operator.controller.settings import OperatorSettings

if TYPE_CHECKING:
    from octavo_operator.controller.run import Operator


class PortUnusable(OctavoOperatorError):  # noqa: N818
    """The port of health and metrics cannot be listened on."""


class HealthServer:
    """/healthz fails when a watch went silent or kopf ended; /readyz tells whether this operator can take over."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._operator: Operator | None = None
        self._runner: web.AppRunner | None = None
        self.port = settings.health_port

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "0.0.0.0", self._settings.health_port)
        try:
            await site.start()
        except OSError as error:
            message = f"port {self._settings.health_port} cannot be used for health and metrics: {error.strerror}"
            raise PortUnusable(f"{message}; choose another with --health-port") from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def watch(self, operator: Operator) -> None:
        """From now on this operator leads, and health depends on its work."""
        self._operator = operator

    async def _healthz(self, _: web.Request) -> web.Response:
        operator = self._operator
        if operator is None:
            return web.json_response({"status": "ok", "leader": False})
        silence = operator.room.silence_s() if operator.room else 0.0
        if not operator.running:
            return web.json_response({"status": "kopf ended"}, status=503)
        if silence > self._settings.watch_stale_s:
            return web.json_response({"status": f"a watch is silent for {silence:.0f} s"}, status=503)
        return web.json_response({"status": "ok", "leader": True, "watchSilenceSeconds": round(silence, 1)})

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        registry = CollectorRegistry()
        registry.register(OperatorCollector(self._operator.room if self._operator else None))
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})
