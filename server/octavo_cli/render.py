"""`octavo render`: the Kubernetes objects that the operator would make of a manifest, without a cluster."""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.manifest import load_manifests
from octavo_operator.api.validation import Resource
from octavo_operator.desired import render_resources
from octavo_operator.plan import Facts
from octavo_operator.plan.values import ModelFacts

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
    check_fit: Annotated[
        bool,
        typer.Option("--check-fit", help="Ask the hub for size and shape of hf:// models, and say whether they fit."),
    ] = False,
    hub_endpoint: Annotated[str, typer.Option(envvar="HF_ENDPOINT", help="The hub to ask.")] = "https://huggingface.co",
) -> None:
    """Print the Kubernetes objects that the operator makes of these manifests.

    Needs no cluster. Exits with 2, naming every wrong field, when a manifest cannot be run, or a model does not fit.
    """
    try:
        resources = load_manifests(file)
        models = _ask_hub(resources, hub_endpoint) if check_fit else {}
        facts = Facts(engine_image=engine_image)
        objects, warnings = render_resources(resources, facts, lambda service: models.get(service.name, ModelFacts()))
    except ManifestErrors as wrong:
        _refuse(wrong)
    for name, known in models.items():
        if known.shape is None:
            warnings.append(f"InferenceService/{name}: whether it fits is not known: {known.unknown}")
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(_text(objects, output), nl=False)


def _ask_hub(resources: Sequence[Resource], endpoint: str) -> dict[str, ModelFacts]:
    """What the hub says of every service's model, by the name of the service."""
    from octavo_operator.controller.hub import ask_hub

    services = {r.name: r.spec.model for r in resources if isinstance(r, InferenceService)}
    return asyncio.run(ask_hub(endpoint, services))


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
