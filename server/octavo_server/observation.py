"""Routes that watch the replica: probes, metrics, version, load. Answered at any time, whatever the engine does."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from octavo_engine.errors import OctavoError
from octavo_engine.messages import LoadProgress
from octavo_server.errors import ApiError, from_engine_error
from octavo_server.json_response import JsonResponse
from octavo_server.lifecycle import Phase
from octavo_server.replica import VERSION, Replica

SNAPSHOT_TIMEOUT_S = 10.0


def router(replica: Replica) -> APIRouter:
    """Health, metrics, version and load."""
    routes = APIRouter(tags=["observation"])

    @routes.get("/health/live")
    async def live() -> Response:
        """200 while the process is well; 503 asks for a restart."""
        problem = replica.health_problem()
        if problem is None:
            return JsonResponse({"status": "alive"})
        return JsonResponse({"status": "failed", "reason": problem}, status_code=503)

    @routes.get("/health/ready")
    async def ready() -> Response:
        """200 when requests should be sent here."""
        return _readiness(replica)

    @routes.get("/health")
    async def health() -> Response:
        """As readiness."""
        return _readiness(replica)

    @routes.get("/ping")
    @routes.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        """As readiness."""
        return _readiness(replica)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(replica.metrics.render(), headers={"content-type": replica.metrics.content_type})

    @routes.get("/version")
    async def version() -> Response:
        """The version of Octavo."""
        return JsonResponse({"version": VERSION})

    @routes.get("/usage")
    async def usage(ids: Annotated[str, Query(max_length=8_192)] = "") -> Response:
        """What ended requests consumed, by the ids their gateway gave them (comma separated)."""
        return JsonResponse(replica.usage.report(ids.split(",")))

    @routes.get("/load")
    async def load() -> Response:
        """Requests in flight in this process."""
        return JsonResponse({"server_load": replica.lifecycle.num_in_flight})

    if replica.settings.debug_routes:

        @routes.get("/debug/scheduler")
        async def scheduler() -> Response:
            """What runs and waits in each engine, and where each sequence stands. No text, no tokens."""
            try:
                async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                    taken = await replica.engine.snapshot(request_id=f"snapshot-{uuid.uuid4().hex}")
            except OctavoError as error:
                raise from_engine_error(error) from error
            except TimeoutError:
                raise ApiError(504, f"The engine's step has not ended within {SNAPSHOT_TIMEOUT_S:g} s.") from None
            return JsonResponse({"engines": taken})

    return routes


def _readiness(replica: Replica) -> Response:
    phase = replica.lifecycle.phase
    problem = replica.health_problem()
    if problem is not None:
        return JsonResponse({"status": "failed", "reason": problem}, status_code=503)
    if phase is Phase.READY:
        return JsonResponse({"status": "ready"})
    body: dict[str, object] = {"status": phase.value}
    progress = replica.engine.progress
    if phase is Phase.STARTING:
        body["progress"] = {} if progress is None else _describe(progress)
    return JsonResponse(body, status_code=503)


def _describe(progress: LoadProgress) -> dict[str, object]:
    return {"phase": progress.phase, "fraction": progress.fraction, "detail": progress.detail}
