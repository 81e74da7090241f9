"""What is known of the cluster: objects by kind, namespace and name, and by the labels that tie them to an owner."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from octavo_operator.controller.client import Kind
from octavo_operator.render.labels import COMPONENT, SERVICE_LABEL
from octavo_operator.render.model_cache import CACHE_LABEL

Object = dict[str, Any]
Key = tuple[str, str]  # namespace, name
SHARED_LENGTH = 64  # longer texts seldom occur twice
INDEXED = (SERVICE_LABEL, CACHE_LABEL, COMPONENT)


class Store:
    """An in-memory view, fed by watches. Reading costs no call, and finding by an indexed label no scan."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[Key, Object]] = {}
        self._index: dict[tuple[Kind, str, str, str], set[Key]] = {}  # kind, namespace, label, value

    def put(self, kind: Kind, obj: Object) -> None:
        key = key_of(obj)
        obj = lean(obj)
        old = self._objects.setdefault(kind, {}).get(key)
        if old is not None:
            self._unindex(kind, old)
        self._objects[kind][key] = obj
        for entry in _entries(kind, obj):
            self._index.setdefault(entry, set()).add(key)

    def remove(self, kind: Kind, obj: Object) -> None:
        old = self._objects.get(kind, {}).pop(key_of(obj), None)
        if old is not None:
            self._unindex(kind, old)

    def replace(self, kind: Kind, objects: list[Object], namespace: str | None = None) -> list[Object]:
        """Everything of a kind (of a namespace) at once, after a list. Returns what is gone."""
        found = {key_of(obj) for obj in objects}
        gone = [
            obj for key, obj in self._objects.get(kind, {}).items() if key not in found and namespace in (None, key[0])
        ]
        for obj in gone:
            self.remove(kind, obj)
        for obj in objects:
            self.put(kind, obj)
        return gone

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        return self._objects.get(kind, {}).get((namespace or "", name))

    def all(self, kind: Kind) -> list[Object]:
        return list(self._objects.get(kind, {}).values())

    def labelled(self, kind: Kind, namespace: str, label: str, value: str) -> Iterator[Object]:
        """Objects of a namespace whose indexed label has this value, by name."""
        for key in sorted(self._index.get((kind, namespace, label, value), ())):
            yield self._objects[kind][key]

    def _unindex(self, kind: Kind, obj: Object) -> None:
        key = key_of(obj)
        for entry in _entries(kind, obj):
            keys = self._index[entry]
            keys.discard(key)
            if not keys:
                del self._index[entry]


def lean(obj: Object) -> Object:
    """A copy without what nobody reads, whose words are shared: thousands of objects consist of the same few words."""
    copy: Object = _shared(obj)
    copy["metadata"].pop("managedFields", None)
    return copy


def _shared(value: Any) -> Any:
    if isinstance(value, dict):
        return {sys.intern(name): _shared(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_shared(part) for part in value]
    return sys.intern(value) if type(value) is str and len(value) <= SHARED_LENGTH else value


def key_of(obj: Object) -> Key:
    """(namespace, name); the namespace is empty for cluster-wide objects."""
    metadata = obj["metadata"]
    return metadata.get("namespace") or "", metadata["name"]


def _entries(kind: Kind, obj: Object) -> Iterator[tuple[Kind, str, str, str]]:
    labels = obj["metadata"].get("labels") or {}
    for label in INDEXED:
        if label in labels:
            yield kind, key_of(obj)[0], label, labels[label]
