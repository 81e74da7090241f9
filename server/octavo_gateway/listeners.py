"""The sockets a gateway listens on, and the addresses they have."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from octavo_gateway.errors import ConfigError
from octavo_gateway.settings import GatewaySettings


@dataclass(frozen=True)
class Listeners:
    """Bound, not yet accepting. `port` is the real one even where the settings say 0."""

    settings: GatewaySettings
    public: socket.socket
    admin: socket.socket | None = None
    metrics: socket.socket | None = None

    @classmethod
    def bind(cls, settings: GatewaySettings) -> Listeners:
        """Raises `ConfigError` for an address that cannot be had."""
        return cls(settings, _bind(settings.host, settings.port, "port"), *_bind_side_doors(settings))

    @classmethod
    def bind_for_workers(cls, settings: GatewaySettings) -> list[Listeners]:
        """One set for each worker: the kernel spreads connections over their public sockets; the others are shared.

        Whoever holds them keeps connections waiting, rather than refused, while a worker is replaced.
        """
        if settings.port:
            _bind(settings.host, settings.port, "port").close()  # another program's workers would share it silently
        side_doors = _bind_side_doors(settings)
        first = _bind(settings.host, settings.port, "port", reuse_port=True)
        others = [_bind(settings.host, _port(first), "port", reuse_port=True) for _ in range(settings.workers - 1)]
        return [cls(settings, public, *side_doors) for public in (first, *others)]

    def close(self) -> None:
        """Leave the addresses; connections that were accepted stay."""
        for listener in (self.public, self.admin, self.metrics):
            if listener is not None:
                listener.close()

    @property
    def port(self) -> int:
        return _port(self.public)

    @property
    def address(self) -> str:
        """Base URL for clients on this machine or network."""
        scheme = "https" if self.settings.tls_certificate else "http"
        return f"{scheme}://{_reachable(self.settings.host)}:{self.port}"

    @property
    def admin_address(self) -> str | None:
        """Base URL of the admin API, if there is one."""
        return None if self.admin is None else f"http://{_reachable(self.settings.admin_host)}:{_port(self.admin)}"

    @property
    def metrics_address(self) -> str | None:
        """Base URL of the metrics port, if there is one."""
        return None if self.metrics is None else f"http://{_reachable(self.settings.host)}:{_port(self.metrics)}"


def _bind_side_doors(settings: GatewaySettings) -> tuple[socket.socket | None, socket.socket | None]:
    admin = metrics = None
    if settings.admin_port is not None:
        admin = _bind(settings.admin_host, settings.admin_port, "admin_port")
    if settings.metrics_port is not None:
        metrics = _bind(settings.host, settings.metrics_port, "metrics_port")
    return admin, metrics


def _bind(host: str, port: int, setting: str, *, reuse_port: bool = False) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{setting}: cannot listen on {host}:{port} ({error.strerror}); choose another port"
        ) from error
    listener.setblocking(False)
    return listener


def _port(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def _reachable(host: str) -> str:
    """A host to put into a URL for an address that is listened on."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
