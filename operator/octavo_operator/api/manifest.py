"""Read manifests: YAML files, several documents each, `-` for standard input; every error of all files at once."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from octavo_operator.api.errors import FieldError, ManifestErrors
from octavo_operator.api.validation import Resource, parse_resource

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
SUFFIXES = (".yaml", ".yml", ".json")


def load_manifests(sources: Iterable[str | Path], *, local: bool = False) -> list[Resource]:
    """The resources of files, folders (their YAML and JSON files) and `-`, in order.

    Raises `ManifestErrors` listing everything that is wrong in any of them. `local` allows what only local mode can do.
    """
    resources: list[Resource] = []
    errors: list[FieldError] = []
    for source in sources:
        try:
            for name, text in _texts(str(source)):
                found, wrong = _parse_text(name, text, local)
                resources += found
                errors += wrong
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            errors.append(FieldError("", f"cannot be read: {reason}", file=str(source)))
    if not errors and not resources:
        errors.append(FieldError("", "no resource found", file=", ".join(map(str, sources))))
    errors += _duplicates(resources)
    if errors:
        raise ManifestErrors(errors, resources)
    return resources


def parse_manifests(text: str, *, file: str = "", local: bool = False) -> list[Resource]:
    """The resources of one YAML text. Raises `ManifestErrors`."""
    resources, errors = _parse_text(file, text, local)
    if errors:
        raise ManifestErrors(errors)
    return resources


def _texts(source: str) -> Iterator[tuple[str, str]]:
    if source == "-":
        yield "<stdin>", sys.stdin.read(MAX_MANIFEST_BYTES)
        return
    path = Path(source)
    files: Sequence[Path] = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    for file in files:
        if file.is_file() and file.stat().st_size > MAX_MANIFEST_BYTES:
            raise OSError(27, f"larger than {MAX_MANIFEST_BYTES // 1024 // 1024} MiB")
        yield str(file), file.read_text()


def _parse_text(file: str, text: str, local: bool) -> tuple[list[Resource], list[FieldError]]:
    resources: list[Resource] = []
    errors: list[FieldError] = []
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        return [], [FieldError("", f"is not valid YAML: {_yaml_problem(error)}", file=file)]
    for index, document in enumerate(documents):
        if document is None:
            continue
        try:
            resources.append(parse_resource(document, local=local))
        except ManifestErrors as wrong:
            label = _label(document)
            errors += [FieldError(e.path, e.message, e.value, file, index, label) for e in wrong.errors]
    return resources, errors


def _duplicates(resources: Sequence[Resource]) -> list[FieldError]:
    seen: set[tuple[str, str, str]] = set()
    errors = []
    for resource in resources:
        key = (resource.kind, resource.metadata.namespace or "", resource.metadata.name)
        if key in seen:
            label = f"{resource.kind}/{resource.metadata.name}"
            errors.append(FieldError("metadata.name", "appears twice", repr(key[2]), resource=label))
        seen.add(key)
    return errors


def _label(document: Any) -> str:
    if not isinstance(document, dict):
        return ""
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{document.get('kind')}/{name}" if name else ""


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: no dates, no base-60 numbers, and no key twice."""

    yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int")]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, Hashable):
                keys.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0o?[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
)
