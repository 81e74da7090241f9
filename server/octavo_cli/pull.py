"""`octavo pull`: download a model once, to a folder that replicas then read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from octavo_engine.errors import ModelLoadError
from octavo_engine.storage import resolve

CACHE_FOLDER = ".octavo-cache"
TELL_EVERY_S = 5.0


def pull(
    uri: Annotated[str, typer.Argument(help="Address of the model, such as hf://ORG/NAME.")],
    to: Annotated[Path, typer.Option(help="Folder that shall hold the model, or stand for it.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download a model into a folder.

    Files are kept in a cache beside the folder and linked from it, so that a second call downloads nothing and a
    broken one goes on. A model of one file appears as FOLDER/FILE, a model of several as FOLDER.
    """
    said = -TELL_EVERY_S

    def tell(fraction: float, detail: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= TELL_EVERY_S or fraction == 1.0:
            said = now
            typer.echo(f"{fraction:.0%} {detail}")

    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = resolve(uri, revision=revision, cache_dir=to.parent / CACHE_FOLDER, on_progress=tell)
    except ModelLoadError as error:
        typer.echo(f"octavo pull: {error}", err=True)
        raise typer.Exit(1) from error
    place = link(found, to)
    typer.echo(f"{uri} is at {place}")


def link(found: Path, to: Path) -> Path:
    """Make `to`, or the file of the same name in it, a relative link to what was found; at once or not at all."""
    place = to
    if found.is_file():
        if to.is_symlink():
            to.unlink()
        to.mkdir(parents=True, exist_ok=True)
        place = to / found.name
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    temporary.symlink_to(os.path.relpath(found, place.parent))
    temporary.replace(place)
    return place
