"""HTTP/1.1 towards the replicas: pooled connections that stream bytes without copying or parsing them."""

from octavo_gateway.upstream.connection import (
    BrokenResponseError,
    ConnectError,
    ConnectionLostError,
    ResponseHead,
    UpstreamConnection,
    UpstreamError,
)
from octavo_gateway.upstream.pool import UpstreamPool
from octavo_gateway.upstream.tls import replica_context

__all__ = [
    "BrokenResponseError",
    "ConnectError",
    "ConnectionLostError",
    "ResponseHead",
    "UpstreamConnection",
    "UpstreamError",
    "UpstreamPool",
    "replica_context",
]
