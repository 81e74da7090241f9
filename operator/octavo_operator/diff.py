"""reconcile(desired, observed) -> Changes: what to write so that the cluster is as wanted. Pure and idempotent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo_operator.api.quantity import parse_quantity
from octavo_operator.render.patch import MERGE_KEYS

Object = dict[str, Any]
FINGERPRINT = "serving.octavo.dev/applied"
_QUANTITIES = frozenset({"limits", "requests"})
_KEYED = {**MERGE_KEYS, "ownerReferences": "uid", "claims": "name"}


@dataclass(frozen=True)
class Changes:
    """Objects to apply, and objects to delete."""

    apply: tuple[Object, ...] = ()
    delete: tuple[Object, ...] = ()

    @property
    def none(self) -> bool:
        return not self.apply and not self.delete


def stamped(objects: Iterable[Object]) -> list[Object]:
    """The objects with a fingerprint of themselves: it tells that something was taken out of what we apply."""
    return [_stamped(obj) for obj in objects]


def _stamped(obj: Object) -> Object:
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    metadata = obj["metadata"]
    annotations = {**(metadata.get("annotations") or {}), FINGERPRINT: hashlib.sha256(text.encode()).hexdigest()[:16]}
    return {**obj, "metadata": {**metadata, "annotations": annotations}}


def identity(obj: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What makes an object itself: apiVersion, kind, namespace, name."""
    metadata = obj["metadata"]
    return str(obj["apiVersion"]), str(obj["kind"]), metadata.get("namespace") or "", str(metadata["name"])


def reconcile(desired: Iterable[Object], observed: Iterable[Object], owner_uid: str) -> Changes:
    """Apply what is absent or differs in a field that is ours; delete what is ours and no longer wanted.

    `desired` come from `stamped`. `observed` are the objects that exist under the labels of the owner; those it
    does not control are left alone.
    """
    wanted = {identity(obj): obj for obj in desired}
    found = {identity(obj): obj for obj in observed}
    apply = tuple(obj for key, obj in wanted.items() if key not in found or not holds(obj, found[key]))
    delete = tuple(
        obj for key, obj in found.items() if key not in wanted and _is_owned(obj, owner_uid) and not _is_going(obj)
    )
    return Changes(apply, delete)


def holds(wanted: Any, found: Any, key: str = "") -> bool:
    """Whether everything wanted is found. More may be found: defaults of the API server, fields of other managers.

    An empty value equals an absent one, quantities are compared by value, and lists with merge keys by key.
    """
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            return not wanted and found is None
        if key in _QUANTITIES:
            return all(_same_quantity(value, found.get(name)) for name, value in wanted.items())
        return all(holds(value, found.get(name), name) for name, value in wanted.items())
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if not isinstance(found, Sequence) or isinstance(found, str):
            return not wanted and found is None
        return _list_holds(wanted, found, key)
    if found is None:
        return wanted in (None, "", False)
    return bool(wanted == found)


def _list_holds(wanted: Sequence[Any], found: Sequence[Any], key: str) -> bool:
    name = _KEYED.get(key)
    if name is None or not all(isinstance(item, Mapping) and name in item for item in wanted):
        return len(wanted) == len(found) and all(holds(w, f) for w, f in zip(wanted, found, strict=True))
    by_key = {item.get(name): item for item in found if isinstance(item, Mapping)}
    return all(item[name] in by_key and holds(item, by_key[item[name]]) for item in wanted)


def _same_quantity(wanted: Any, found: Any) -> bool:
    if found is None:
        return False
    try:
        return parse_quantity(wanted) == parse_quantity(found)
    except ValueError:
        return bool(wanted == found)


def _is_owned(obj: Mapping[str, Any], owner_uid: str) -> bool:
    references = obj["metadata"].get("ownerReferences") or []
    return any(r.get("uid") == owner_uid and r.get("controller") for r in references)


def _is_going(obj: Mapping[str, Any]) -> bool:
    return bool(obj["metadata"].get("deletionTimestamp"))
