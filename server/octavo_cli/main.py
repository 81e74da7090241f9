"""`octavo`: one command for the engine, the gateway, the operator and local mode.

Command bodies live in their own modules and are imported only when called, so `octavo --help` is instant and
`pip install octavo[operator]` needs no torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Command:
    """Where a command's function lives, what it is for, and which extra of the distribution carries its needs."""

    module: str
    function: str
    help: str
    panel: str
    extra: str


SERVE, CLUSTER, WORK = "Serve", "Cluster", "Work with models"

COMMANDS: dict[str, Command] = {
    "up": Command("octavo_cli.up", "up", "Serve InferenceService manifests on this machine.", SERVE, "demo"),
    "serve": Command("octavo_cli.serve", "serve", "Run one engine replica with its HTTP faces.", SERVE, "server"),
    "gateway": Command("octavo_cli.gateway", "gateway", "Run the tenants' door to many replicas.", SERVE, "gateway"),
    "usage": Command("octavo_cli.usage", "usage", "Report what tenants used and what it costs.", CLUSTER, "gateway"),
    "operator": Command("octavo_cli.operator", "operator", "Run the Kubernetes operator.", CLUSTER, "operator"),
    "render": Command("octavo_cli.render", "render", "Print a manifest's Kubernetes objects.", CLUSTER, "operator"),
    "chat": Command("octavo_cli.chat", "chat", "Talk to a model from the terminal.", WORK, "server"),
    "bench": Command("octavo_cli.bench", "bench", "Load an OpenAI endpoint and report latencies.", WORK, "server"),
    "quantize": Command("octavo_cli.quantize", "quantize", "Make a model smaller, with a report.", WORK, "server"),
    "plan": Command("octavo_cli.plan", "plan", "Say what a model needs and what fits.", WORK, "server"),
    "tune": Command("octavo_cli.tune", "tune", "Measure kernel configurations on this GPU.", WORK, "gpu"),
    "pull": Command("octavo_cli.pull", "pull", "Download a model into a folder.", WORK, "server"),
    "batch": Command("octavo_cli.batch", "batch", "Run a file of requests, resumably.", WORK, "server"),
    "simulate": Command(
        "octavo_cli.simulate", "simulate_command", "Play a trace against scaling laws.", CLUSTER, "operator"
    ),
    "doctor": Command("octavo_cli.doctor", "doctor", "Say what this machine can do.", WORK, "server"),
}


def build_app(invoked: str | None) -> typer.Typer:
    """The command tree; only the invoked command's module is imported, the others show their help line alone."""
    app = typer.Typer(
        name="octavo",
        help="LLM inference as a service: one manifest on a laptop or on Kubernetes.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        body = _load(name, command) if name == invoked else _not_loaded
        app.command(name, help=None if name == invoked else command.help, rich_help_panel=command.panel)(body)
    return app


def main() -> None:
    """Entry point of the `octavo` script."""
    build_app(_invoked_command())()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"octavo {version('octavo')}")
        raise typer.Exit


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _invoked_command() -> str | None:
    """The subcommand being run, or being completed by the shell."""
    words = sys.argv[1:]
    if "_OCTAVO_COMPLETE" in os.environ:
        words = os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()[1:]
    return next((word for word in words if not word.startswith("-")), None)


def _load(name: str, command: Command) -> Callable[..., Any]:
    try:
        body: Callable[..., Any] = getattr(importlib.import_module(command.module), command.function)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("octavo_"):
            raise
        typer.echo(
            f"octavo {name}: the Python package {error.name!r} is missing; "
            f"install it with: pip install 'octavo[{command.extra}]'",
            err=True,
        )
        raise SystemExit(1) from error
    return body


def _not_loaded() -> None:
    raise AssertionError("only the invoked command can be called")


if __name__ == "__main__":
    main()
