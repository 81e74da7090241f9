"""What is known of the cluster: objects by kind, namespace and name, and whom each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo_operator.controller.client import Kind

Object = dict[str, Any]
Key = tuple[str, str]  # namespace, name


class Store:
    """An in-memory view, fed by watches. Reading costs no call."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[Key, Object]] = {}

    def put(self, kind: Kind, obj: Object) -> None:
        self._objects.setdefault(kind, {})[key_of(obj)] = obj

    def remove(self, kind: Kind, obj: Object) -> None:
        self._objects.get(kind, {}).pop(key_of(obj), None)

    def replace(self, kind: Kind, objects: list[Object], namespace: str | None = None) -> list[Object]:
        """Everything of a kind (of a namespace) at once, after a list. Returns what is gone."""
        old = self._objects.get(kind, {})
        new = {key_of(obj): obj for obj in objects}
        kept = {} if namespace is None else {key: obj for key, obj in old.items() if key[0] != namespace}
        self._objects[kind] = {**kept, **new}
        return [obj for key, obj in old.items() if key not in self._objects[kind]]

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        return self._objects.get(kind, {}).get((namespace or "", name))

    def all(self, kind: Kind) -> list[Object]:
        return list(self._objects.get(kind, {}).values())

    def labelled(self, kind: Kind, namespace: str, label: str, value: str) -> Iterator[Object]:
        """Objects of a namespace that carry a label with this value."""
        for (ns, _), obj in self._objects.get(kind, {}).items():
            if ns == namespace and (obj["metadata"].get("labels") or {}).get(label) == value:
                yield obj


def key_of(obj: Object) -> Key:
    """(namespace, name); the namespace is empty for cluster-wide objects."""
    metadata = obj["metadata"]
    return metadata.get("namespace") or "", metadata["name"]
