"""`octavo up`: the services of InferenceService manifests on this machine, in child processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from octavo_cli.local.ask import ask
from octavo_cli.local.host import LocalHost, StartFailedError
from octavo_cli.local.manifests import local_workloads
from octavo_cli.local.screen import Screen
from octavo_cli.local.table import ServiceRow
from octavo_cli.openai_client import EndpointError
from octavo_gateway.discovery import StaticFile, load_static
from octavo_gateway.errors import ConfigError
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings, load_settings
from octavo_gateway.usage import LedgerError, PriceTable
from octavo_operator.api.errors import ManifestErrors
from octavo_operator.plan import Workload

BAD_MANIFEST = 2
INTERRUPTED = 130
QUIET = {"access_log": False, "log_level": "warning", "debug_headers": True}
"""Defaults of the gateway that differ here: the screen tells what happens."""


def up(
    file: Annotated[
        list[str],
        typer.Option("--file", "-f", help="Manifest: a file, a folder, or - for standard input. May be repeated."),
    ],
    host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port the gateway listens on; 0 takes a free one.")] = 8000,
    question: Annotated[
        str | None, typer.Option("--ask", help="Ask this once ready, and stream the answer to the terminal.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit when ready (and, with --ask, answered).")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live table, also on a terminal.")] = False,
    tenants: Annotated[
        str | None,
        typer.Option(help="File or folder of InferenceTenants and their Secrets.", show_default="open to everybody"),
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="Folder of the usage ledger.", show_default="nothing is recorded")
    ] = None,
    gateway: Annotated[
        Path | None,
        typer.Option(
            help="Config file of the gateway: `settings:` and `prices:` as `octavo gateway` reads them.",
            show_default="none",
        ),
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where the replicas' logs go.", show_default="~/.local/state/octavo/logs")
    ] = None,
) -> None:
    """Serve InferenceService manifests on this machine.

    Starts engine replicas as child processes and one gateway in front of them, scales them between minReplicas and
    maxReplicas as the operator would, restarts crashed ones, and shows what happens. Ctrl-C drains and ends.
    OCTAVO_GATEWAY_* variables set the gateway as they do for `octavo gateway`.

    Exit codes: 0 served and ended, 1 failed, 2 bad manifest or option.
    """
    console = Console()
    try:
        workloads, warnings = local_workloads(file)
    except ManifestErrors as wrong:
        for error in wrong.errors:
            typer.echo(f"octavo up: {error}", err=True)
        raise typer.Exit(BAD_MANIFEST) from wrong
    for warning in warnings:
        typer.echo(f"octavo up: {warning}", err=True)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    flags = {"host": host, "port": port, "tenants": tenants, "ledger": ledger}
    try:
        settings, prices = gateway_of(gateway, {name: value for name, value in flags.items() if value is not None})
        logs = log_dir or _default_log_dir()
        make_host = partial(LocalHost, workloads, settings, prices, logs)
        session = _Session(workloads, make_host, logs, console, live=console.is_terminal and not plain)
        code = asyncio.run(session.run(question, once))
    except (ConfigError, LedgerError) as error:
        typer.echo(f"octavo up: {error}", err=True)
        raise typer.Exit(BAD_MANIFEST) from error
    raise typer.Exit(code)


def gateway_of(file: Path | None, flags: Mapping[str, Any]) -> tuple[GatewaySettings, PriceTable]:
    """Settings and prices, from the file, the environment and the flags; raises `ConfigError`."""
    read = load_static(file) if file is not None else StaticFile()
    if read.models:
        raise ConfigError(f"{file}: models: octavo up serves those of its manifests")
    settings = load_settings(
        flags, file_values=QUIET | read.settings, file_name=str(file or "defaults"), environment=os.environ
    )
    if settings.workers != 1:
        raise ConfigError("workers: octavo up runs one gateway process")
    return settings, PriceTable.parse(read.prices, str(file))


class _Session:
    """One run of `octavo up`: the host, the screen, and what is said in between."""

    def __init__(
        self,
        workloads: list[Workload],
        make_host: Callable[[], LocalHost],
        log_dir: Path,
        console: Console,
        *,
        live: bool,
    ) -> None:
        self._workloads = workloads
        self._make_host = make_host
        self._log_dir = log_dir
        self._console = console
        self._screen = Screen(console, live=live)
        self._signals = 0

    async def run(self, question: str | None, once: bool) -> int:
        """Serve until a signal or, with `once`, until all is done; returns the exit code."""
        self._console.print(f"[bold]Octavo {version('octavo')}[/] serves {_names(self._workloads)}", highlight=False)
        host = self._make_host()
        self._listen_to_signals(host)
        with self._screen:
            serving = asyncio.create_task(host.run(lambda rows: self._show(host, rows)))
            talking = asyncio.create_task(self._talk(host, question, once))
            done, _ = await asyncio.wait({serving, talking}, return_when=asyncio.FIRST_COMPLETED)
            if talking not in done:
                talking.cancel()
                await asyncio.gather(talking, return_exceptions=True)
            code = talking.result() if talking.done() and not talking.cancelled() else 0
            if once or code:
                host.stop()
            await serving
        return code

    async def _talk(self, host: LocalHost, question: str | None, once: bool) -> int:
        """Wait for the services, ask, tell where they are."""
        try:
            await host.until_ready()
            address = host.gateway.address
            if question is not None:
                await self._ask(address, question)
        except (StartFailedError, EndpointError) as error:
            self._console.print(f"[red]octavo up:[/] {error}", highlight=False)
            if once or isinstance(error, StartFailedError):
                return 1
        if not once:
            self._invite(host.gateway)
        return 0

    async def _ask(self, address: str, question: str) -> None:
        model = self._workloads[0].model_name
        self._console.print(f"\n[bold]{model}>[/] {question}", highlight=False)
        with self._screen.paused():
            answer = await ask(address, model, question, self._write)
            self._console.print()
        self._console.print(
            f"[dim]{answer.tokens} tokens; the first after {answer.first_token_s:.2f} s, "
            f"then {answer.tokens_per_s:.0f} a second[/]\n",
            highlight=False,
        )

    def _write(self, text: str) -> None:
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def _invite(self, gateway: GatewayServer) -> None:
        """How to reach what runs now."""
        address = gateway.address
        admin = gateway.listeners.admin_address if gateway.listeners is not None else None
        headers = "-H 'content-type: application/json'"
        if gateway.settings.tenants:
            headers += " -H 'authorization: Bearer KEY'"
        body = f'{{"model": "{self._workloads[0].model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        lines = [
            f"[bold]OpenAI API[/]  {address}/v1",
            f"[bold]Web page[/]    {address}/",
            *([f"[bold]Admin page[/]  {admin}/"] if admin else []),
            f"[bold]Try it[/]      curl {address}/v1/chat/completions {headers} -d '{body}'",
            f"[bold]Logs[/]        {self._log_dir}",
            "Ctrl-C drains and ends.",
        ]
        for line in lines:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _show(self, host: LocalHost, rows: list[ServiceRow]) -> None:
        ending = "draining; Ctrl-C again ends at once" if self._signals else "Ctrl-C drains and ends"
        self._screen.show(rows, f"{host.gateway.address} - {ending}")

    def _listen_to_signals(self, host: LocalHost) -> None:
        """The first signal drains, the second ends everything at once."""

        def on_signal() -> None:
            self._signals += 1
            if self._signals == 1:
                self._console.print("Draining: running requests finish, new ones are refused ...")
                host.stop()
            else:
                host.kill()
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(INTERRUPTED)

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)


def _names(workloads: list[Workload]) -> str:
    return ", ".join(w.name for w in workloads)


def _default_log_dir() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "octavo" / "logs"
