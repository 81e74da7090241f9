"""`octavo operator`: reconcile InferenceServices on a Kubernetes cluster."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

import typer

from octavo_operator.api.errors import OctavoOperatorError
from octavo_operator.controller.run import run
from octavo_operator.controller.settings import OperatorSettings


def operator(
    namespace: Annotated[
        list[str] | None,
        typer.Option("--namespace", "-n", help="Work in this namespace only; repeatable. Default: all namespaces."),
    ] = None,
    own_namespace: Annotated[
        str, typer.Option(envvar="POD_NAMESPACE", help="Namespace of the operator: its lease, gateways and tenants.")
    ] = "octavo-system",
    leader_election: Annotated[
        bool, typer.Option(help="Work only while holding the lease, so that several replicas may run.")
    ] = True,
    engine_image: Annotated[
        str | None, typer.Option(envvar="OCTAVO_ENGINE_IMAGE", help="Image of Octavo's own engine.")
    ] = None,
    gateway_url: Annotated[
        str, typer.Option(envvar="OCTAVO_GATEWAY_URL", help="Base address for clients, shown in status.url.")
    ] = "",
    hub_endpoint: Annotated[
        str,
        typer.Option(envvar="OCTAVO_HUB_ENDPOINT", help="Hub to ask whether hf:// models fit; empty: none is asked."),
    ] = "",
    scaling_interval: Annotated[float, typer.Option(min=0.5, help="Seconds between scaling decisions.")] = 5.0,
    scrape_concurrency: Annotated[int, typer.Option(min=1, help="Replicas asked for metrics at once.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Services reconciled at once.")] = 8,
    otlp_endpoint: Annotated[
        str,
        typer.Option(envvar="OCTAVO_OTLP_ENDPOINT", help="OTLP/HTTP collector of traces, such as http://otel:4318."),
    ] = "",
    health_port: Annotated[int, typer.Option(help="Port of /healthz, /readyz and /metrics.")] = 8081,
    webhook_port: Annotated[
        int | None, typer.Option(help="Port of the validating webhook; none is served without it.")
    ] = None,
    webhook_cert_dir: Annotated[
        str, typer.Option(help="Folder with tls.crt and tls.key of the webhook.")
    ] = "/etc/octavo/webhook",
    log_level: Annotated[str, typer.Option(envvar="OCTAVO_LOG_LEVEL", help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the Kubernetes operator until it is told to stop.

    Connects as the pod's service account, or with KUBECONFIG or ~/.kube/config.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # it runs in a thread and says so
    settings = OperatorSettings(
        namespaces=tuple(namespace or ()),
        own_namespace=own_namespace,
        leader_election=leader_election,
        engine_image=engine_image,
        gateway_url=gateway_url,
        hub_endpoint=hub_endpoint,
        scaling_interval_s=scaling_interval,
        scrape_concurrency=scrape_concurrency,
        workers=workers,
        otlp_endpoint=otlp_endpoint,
        health_port=health_port,
        webhook_port=webhook_port,
        webhook_cert_dir=webhook_cert_dir,
    )
    try:
        code = asyncio.run(run(settings))
    except OctavoOperatorError as error:
        typer.echo(f"octavo operator: {error}", err=True)
        code = 1
    raise typer.Exit(code)
