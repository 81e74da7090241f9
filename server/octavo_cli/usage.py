"""`octavo usage`: what tenants and models consumed, and what it costs, from a gateway's ledger."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from octavo_gateway.usage import GROUPS, LedgerError, UsageRow, read_usage
from octavo_gateway.usage.ledger import DATABASE


def usage(
    ledger: Annotated[
        str | None,
        typer.Argument(
            help="The gateway's ledger folder, its usage.sqlite, or a postgresql:// address.",
            envvar="OCTAVO_GATEWAY_LEDGER_URL",
            show_envvar=True,
        ),
    ] = None,
    by: Annotated[str, typer.Option(help=f"Group by, comma separated, out of: {', '.join(GROUPS)}.")] = "tenant,model",
    since: Annotated[datetime | None, typer.Option(help="Only requests begun at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only requests begun before this time (UTC).")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Report usage and cost.

    Token counts are the engines' own. Requests whose count never arrived (the client left, a replica died) are counted
    as estimated. The ledger may be read while a gateway writes it; the last half second may be missing then.
    """
    groups = tuple(part.strip() for part in by.split(","))
    for group in groups:
        if group not in GROUPS:
            raise typer.BadParameter(f"{group!r}: must be out of {', '.join(GROUPS)}", param_hint="--by")
    if ledger is None:
        raise typer.BadParameter("name the ledger's folder, or a postgresql:// address", param_hint="LEDGER")
    try:
        rows = read_usage(_location(ledger), groups, since=_utc(since), until=_utc(until), tenant=tenant)
    except LedgerError as error:
        typer.echo(f"octavo usage: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps([_fields(groups, row) for row in rows], indent=2))
    else:
        console = Console()
        if not console.is_terminal:  # piped: nothing is cut to fit a screen
            console = Console(width=200)
        console.print(_table(groups, rows))


def _location(ledger: str) -> Path | str:
    if ledger.startswith(("postgresql://", "postgres://")):
        return ledger
    path = Path(ledger)
    return path / DATABASE if path.is_dir() else path


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def _fields(groups: tuple[str, ...], row: UsageRow) -> dict[str, object]:
    return dict(zip(groups, row.group, strict=True)) | {
        "requests": row.requests,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "output_tokens": row.output_tokens,
        "estimated_requests": row.estimated,
        "cost": row.cost,
    }


def _table(groups: tuple[str, ...], rows: list[UsageRow]) -> Table:
    table = Table(show_footer=len(rows) > 1, box=box.SIMPLE)
    for index, group in enumerate(groups):
        table.add_column(group.capitalize(), footer="Total" if index == 0 else "")
    sums = [
        ("Requests", [row.requests for row in rows]),
        ("Prompt", [row.prompt_tokens for row in rows]),
        ("Cached", [row.cached_tokens for row in rows]),
        ("Output", [row.output_tokens for row in rows]),
        ("Estimated", [row.estimated for row in rows]),
    ]
    for title, values in sums:
        table.add_column(title, justify="right", footer=f"{sum(values):,}")
    table.add_column("Cost", justify="right", footer=f"{sum(row.cost for row in rows):,.6f}")
    for number, row in enumerate(rows):
        counts = [f"{values[number]:,}" for _, values in sums]
        table.add_row(*(part or "-" for part in row.group), *counts, f"{row.cost:,.6f}")
    return table
