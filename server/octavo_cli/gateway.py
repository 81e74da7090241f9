"""`octavo gateway`: the tenants' door as a process of its own."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from octavo_gateway.access_log import JsonFormatter
from octavo_gateway.discovery import ApiServer, load_static
from octavo_gateway.discovery.static import StaticFile
from octavo_gateway.errors import ConfigError
from octavo_gateway.process import Sources, run_gateway
from octavo_gateway.settings import GatewaySettings, load_settings
from octavo_gateway.tenancy import hash_key
from octavo_gateway.tenancy import new_key as make_key
from octavo_gateway.tenancy.keys import format_hash
from octavo_gateway.usage import LedgerError, PriceTable
from octavo_gateway.workers import Seat, run_workers

NOT_SETTINGS = frozenset({"config", "kubernetes", "kubernetes_api", "namespace", "new_key"})

log = logging.getLogger("octavo.gateway")


def _print_new_key(wanted: bool) -> None:
    if wanted:
        key = make_key()
        typer.echo(f"key:  {key}   (give it to the tenant; it is not stored)")
        typer.echo(f"hash: {format_hash(hash_key(key))}   (put it into the tenant's Secret)")
        raise typer.Exit


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file with `models:` (and optionally `settings:`).", exists=False),
]


def gateway(
    config: ConfigFile = None,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Find models and replicas in the cluster this pod runs in.")
    ] = False,
    kubernetes_api: Annotated[
        str | None, typer.Option(help="Address of the Kubernetes API, such as that of `kubectl proxy`.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Only services of this namespace.", show_default="all")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8080")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share the port.", show_default="1")] = None,
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
        typer.Option(
            help="File or folder of InferenceTenant manifests and Secrets, or `kubernetes`.",
            show_default="open to everybody",
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="Share tenants' limits with other gateways through this Redis.", show_default="own limits"),
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="Folder of the usage ledger.", show_default="nothing is recorded")
    ] = None,
    ledger_url: Annotated[
        str | None,
        typer.Option(
            help="PostgreSQL that keeps the usage records; best given as OCTAVO_GATEWAY_LEDGER_URL.",
            show_default="SQLite in the ledger's folder",
        ),
    ] = None,
    batch_folder: Annotated[
        str | None, typer.Option(help="Folder for tenants' /v1/files and /v1/batches.", show_default="they are off")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port of the admin API; its token is OCTAVO_GATEWAY_ADMIN_TOKEN.", show_default="none"),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of /metrics and /health alone, which need no key there.", show_default="none"),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Collector of traces (OTLP over HTTP).", show_default="no traces")
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
    Models are named in the config file, whose replicas are probed and whose edits take effect within seconds, or found
    in the cluster through the Kubernetes API.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    flags = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
    try:
        sources, file_values = _sources(config, kubernetes, kubernetes_api, namespace)
        settings = load_settings(flags, file_values=file_values, file_name=str(config), environment=os.environ)
        _set_up_logging(settings)
        log.info("settings:\n%s", settings.describe())
        if settings.workers == 1:
            code = _serve(settings, sources)
        else:
            code = run_workers(settings, lambda seat: _serve(settings, sources, seat), _say)
    except ConfigError as error:
        _say(f"octavo gateway: {error}")
        code = 2
    raise typer.Exit(code)


def _serve(settings: GatewaySettings, sources: Sources, seat: Seat | None = None) -> int:
    """Run until a signal; returns the exit code."""
    try:
        uvloop.run(run_gateway(settings, sources, _say, seat))
    except (ConfigError, LedgerError) as error:
        _say(f"octavo gateway: {error}")
        return 2
    return 0


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _sources(
    config: Path | None, kubernetes: bool, kubernetes_api: str | None, namespace: str | None
) -> tuple[Sources, dict[str, Any]]:
    """Where models come from, and the settings written in the config file."""
    in_cluster = kubernetes or kubernetes_api is not None
    if config is None and not in_cluster:
        raise ConfigError("say where the models are: --config FILE, or --kubernetes in a cluster")
    file = load_static(config) if config is not None else StaticFile(models=[])
    if in_cluster and file.models:
        raise ConfigError(f"{config}: models: models come either from this file or from the cluster, not from both")
    if kubernetes_api is not None:
        api_server: ApiServer | None = ApiServer(kubernetes_api.rstrip("/"))
    else:
        api_server = ApiServer.in_cluster() if in_cluster else None
    prices = PriceTable.parse(file.prices, str(config))
    return Sources(None if in_cluster else config, api_server, namespace, prices), file.settings


def _set_up_logging(settings: GatewaySettings) -> None:
    handler = logging.StreamHandler()
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
