"""`octavo gateway`: the tenants' door as a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from octavo_gateway.access_log import JsonFormatter
from octavo_gateway.discovery import StaticDiscovery, load_static
from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings, load_settings

log = logging.getLogger("octavo.gateway")

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file with `models:` (and optionally `settings:`).", exists=False)
]


def gateway(
    config: ConfigFile,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8080")
    ] = None,
    connect_timeout: Annotated[float | None, typer.Option(help="Seconds to reach a replica.", show_default="2")] = None,
    first_byte_timeout: Annotated[
        float | None, typer.Option(help="Seconds until a replica must begin to answer.", show_default="300")
    ] = None,
    idle_timeout: Annotated[
        float | None, typer.Option(help="Longest silence inside an answer, in seconds.", show_default="120")
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Longest a request may take, in seconds.", show_default="3600")
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds running requests get at shutdown.", show_default="30")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Largest request body.", show_default=str(8 * 1024 * 1024))
    ] = None,
    debug_headers: Annotated[
        bool | None, typer.Option(help="Tell replica and routing reason in response headers.", show_default="off")
    ] = None,
    access_log: Annotated[
        bool | None, typer.Option(help="Log one line per request, without its text.", show_default="on")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="json")] = None,
) -> None:
    """Run the tenants' door to many replicas.

    Settings come from the config file's `settings:`, then OCTAVO_GATEWAY_* variables, then these flags.
    Every replica named in the file is probed and gets requests while it is ready; edits take effect within seconds.
    """
    flags = {name: value for name, value in locals().items() if name != "config" and value is not None}
    try:
        settings = load_settings(
            flags, file_values=load_static(config).settings, file_name=str(config), environment=os.environ
        )
        _set_up_logging(settings)
        log.info("settings:\n%s", settings.describe())
        uvloop.run(_run(settings, config))
    except ConfigError as error:
        typer.echo(f"octavo gateway: {error}", err=True)
        raise typer.Exit(2) from error


async def _run(settings: GatewaySettings, config: Path) -> None:
    """Serve until a signal: the first drains, a second one ends at once."""
    registry = Registry()
    server = GatewayServer(settings, registry)
    await server.start()
    discovery = asyncio.create_task(StaticDiscovery(config, registry).run())
    synced = asyncio.Event()
    registry.subscribe(lambda _: synced.set())
    await asyncio.wait({discovery, asyncio.ensure_future(synced.wait())}, return_when=asyncio.FIRST_COMPLETED)
    typer.echo(f"octavo gateway listens at {server.address}", err=True)
    stop = asyncio.Event()
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            sys.exit(130)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, discovery}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        await server.stop(0.0)
        discovery.result()  # raises what ended it
        return
    if server.app.in_flight:
        typer.echo(f"octavo gateway: finishing {server.app.in_flight} requests; Ctrl-C again ends at once", err=True)
    await server.stop()
    discovery.cancel()
    await asyncio.gather(discovery, return_exceptions=True)


def _set_up_logging(settings: GatewaySettings) -> None:
    handler = logging.StreamHandler()
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
