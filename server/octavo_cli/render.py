"""`octavo render`: the Kubernetes objects that the operator would make of a manifest, without a cluster."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.manifest import load_manifests
from octavo_operator.desired import render_resources
from octavo_operator.plan import Facts

BAD_MANIFEST = 2


class OutputFormat(enum.StrEnum):
    """How the objects are printed."""

    YAML = "yaml"
    JSON = "json"


def render(
    file: Annotated[
        list[Path],
        typer.Option("--file", "-f", help="Manifest file or folder, or - for standard input; repeatable."),
    ],
    output: Annotated[OutputFormat, typer.Option("--output", "-o", help="Format of the output.")] = OutputFormat.YAML,
    engine_image: Annotated[str | None, typer.Option(help="Image of Octavo's own engine.")] = None,
) -> None:
    """Print the Kubernetes objects that the operator makes of these manifests.

    Needs no cluster. Exits with 2, naming every wrong field, when a manifest cannot be run.
    """
    try:
        resources = load_manifests(file)
        objects, warnings = render_resources(resources, Facts(engine_image=engine_image))
    except ManifestErrors as wrong:
        _refuse(wrong)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(_text(objects, output), nl=False)


def _refuse(wrong: ManifestErrors) -> NoReturn:
    for error in wrong.errors:
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(BAD_MANIFEST)


def _text(objects: list[dict[str, Any]], output: OutputFormat) -> str:
    if output is OutputFormat.JSON:
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2) + "\n"
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """No anchors, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
