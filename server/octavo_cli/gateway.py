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
from octavo_gateway.tenancy import hash_key
from octavo_gateway.tenancy import new_key as make_key
from octavo_gateway.tenancy.keys import format_hash
from octavo_gateway.tenancy.source import TenantFiles, load_tenants
from octavo_gateway.usage import Ledger, LedgerError, PriceTable

log = logging.getLogger("octavo.gateway")


def _print_new_key(wanted: bool) -> None:
    if wanted:
        key = make_key()
        typer.echo(f"key:  {key}   (give it to the tenant; it is not stored)")
        typer.echo(f"hash: {format_hash(hash_key(key))}   (put it into the tenant's Secret)")
        raise typer.Exit


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
    tenants: Annotated[
        str | None,
        typer.Option(help="File or folder of InferenceTenant manifests and Secrets.", show_default="open to everybody"),
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="Folder of the usage ledger.", show_default="nothing is recorded")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port of the admin API; its token is OCTAVO_GATEWAY_ADMIN_TOKEN.", show_default="none"),
    ] = None,
    new_key: Annotated[
        bool,
        typer.Option(
            "--new-key", help="Print a new API key and its hash, and exit.", callback=_print_new_key, is_eager=True
        ),
    ] = False,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="json")] = None,
) -> None:
    """Run the tenants' door to many replicas.

    Settings come from the config file's `settings:`, then OCTAVO_GATEWAY_* variables, then these flags.
    Every replica named in the file is probed and gets requests while it is ready; edits take effect within seconds.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    flags = {name: value for name, value in given.items() if name not in ("config", "new_key")}
    try:
        file = load_static(config)
        settings = load_settings(flags, file_values=file.settings, file_name=str(config), environment=os.environ)
        prices = PriceTable.parse(file.prices, str(config))
        _set_up_logging(settings)
        log.info("settings:\n%s", settings.describe())
        uvloop.run(_run(settings, config, prices))
    except (ConfigError, LedgerError) as error:
        typer.echo(f"octavo gateway: {error}", err=True)
        raise typer.Exit(2) from error


async def _run(settings: GatewaySettings, config: Path, prices: PriceTable) -> None:
    """Serve until a signal: the first drains, a second one ends at once."""
    registry = Registry()
    directory = load_tenants(Path(settings.tenants)) if settings.tenants else None
    ledger = Ledger(Path(settings.ledger)) if settings.ledger else None
    try:
        server = GatewayServer(settings, registry, directory=directory, ledger=ledger, prices=prices)
        await server.start()
        following = []
        if settings.tenants:
            following.append(
                asyncio.create_task(TenantFiles(Path(settings.tenants), server.app.accounts.set_directory).run())
            )
        await _serve(server, registry, StaticDiscovery(config, registry))
        for task in following:
            task.cancel()
    finally:
        if ledger is not None:
            ledger.close()


async def _serve(server: GatewayServer, registry: Registry, source: StaticDiscovery) -> None:
    discovery = asyncio.create_task(source.run())
    synced = asyncio.Event()
    registry.subscribe(lambda _: synced.set())
    await asyncio.wait({discovery, asyncio.ensure_future(synced.wait())}, return_when=asyncio.FIRST_COMPLETED)
    typer.echo(f"octavo gateway listens at {server.address}", err=True)
    if server.admin_address:
        typer.echo(f"admin API at {server.admin_address}", err=True)
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
