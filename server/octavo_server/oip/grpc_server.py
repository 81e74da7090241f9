"""The gRPC port: inference, health and reflection."""
# ruff: noqa: N802  (names of the protocol)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from octavo_engine.errors import ConfigError
from octavo_server.lifecycle import Phase
from octavo_server.oip.grpc_service import SERVICE, inference_handler
from octavo_server.oip.repository import Repository
from octavo_server.replica import Replica

_WATCH_INTERVAL_S = 0.5


async def start_grpc_server(
    replica: Replica, repository: Repository, host: str, port: int
) -> tuple[grpc.aio.Server, int]:
    """Listen on `port` (0: any) and return the server with the port it got; raises `ConfigError` when it is taken."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", replica.settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
        maximum_concurrent_rpcs=None,
    )
    server.add_generic_rpc_handlers((inference_handler(replica, repository),))
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(replica), server)
    reflection.enable_server_reflection(
        (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"--grpc-port: cannot listen on {address}") from error
    await server.start()
    return server, bound


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1: serving exactly while the replica is ready."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._status()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.service not in ("", SERVICE):
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            return
        shown = None
        while True:
            status = self._status()
            if shown is None or status.status != shown.status:
                shown = status
                yield status
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _status(self) -> Any:
        ready = self._replica.lifecycle.phase is Phase.READY and self._replica.health_problem() is None
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if ready else kinds.NOT_SERVING)
