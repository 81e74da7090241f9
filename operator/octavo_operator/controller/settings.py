"""One typed object that configures the operator."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OperatorSettings:
    """Defaults suit a cluster-wide install by the chart; times are seconds."""

    namespaces: tuple[str, ...] = ()  # empty: every namespace
    own_namespace: str = "octavo-system"
    identity: str = field(default_factory=lambda: f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
    leader_election: bool = True
    lease_name: str = "octavo-operator"
    lease_duration_s: float = 15.0
    lease_renew_s: float = 3.0
    workers: int = 8
    scaling_interval_s: float = 5.0
    scrape_timeout_s: float = 2.0
    scrape_concurrency: int = 64
    resync_s: float = 300.0  # every service is looked at anew this often
    relist_s: float = 60.0  # our own kinds are listed this often: a watch that went silent is no blindness
    gateway_url: str = ""
    hub_endpoint: str = ""  # asked for the shape of hf:// models; empty: nothing is asked
    engine_image: str | None = None
    otlp_endpoint: str = ""  # collector of traces, such as http://otel:4318; empty: none are made
    health_port: int = 8081  # 0 takes a free one
    watch_stale_s: float = 110.0
    webhook_port: int | None = None  # None: no webhook is served; 0 takes a free port
    webhook_cert_dir: str = "/etc/octavo/webhook"  # tls.crt and tls.key

    @classmethod
    def own_namespace_default(cls) -> str:
        """The pod's namespace, else octavo-system."""
        return os.environ.get("POD_NAMESPACE", "octavo-system")
