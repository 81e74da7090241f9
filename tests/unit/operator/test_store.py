from __future__ import annotations

import json
from typing import Any

from octavo_operator.controller.kinds import DEPLOYMENT, POD
from octavo_operator.controller.store import Store
from octavo_operator.render.labels import SERVICE_LABEL


def pod(name: str, service: str = "chat", namespace: str = "team") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "labels": {SERVICE_LABEL: service}}}


def names(store: Store, service: str = "chat", namespace: str = "team") -> list[str]:
    return [o["metadata"]["name"] for o in store.labelled(POD, namespace, SERVICE_LABEL, service)]


def test_objects_are_found_by_owner_within_their_namespace_and_kind() -> None:
    store = Store()
    for obj in (pod("b"), pod("a"), pod("c", "other"), pod("d", namespace="elsewhere")):
        store.put(POD, obj)
    store.put(DEPLOYMENT, pod("chat"))
    assert names(store) == ["a", "b"]


def test_a_label_that_moves_takes_the_object_with_it() -> None:
    store = Store()
    store.put(POD, pod("a"))
    store.put(POD, pod("a", "other"))
    assert names(store) == []
    assert names(store, "other") == ["a"]


def test_what_is_removed_or_absent_from_a_list_is_forgotten() -> None:
    store = Store()
    for name in ("a", "b"):
        store.put(POD, pod(name))
    store.put(POD, pod("x", namespace="elsewhere"))
    store.remove(POD, pod("a"))
    assert names(store) == ["b"]
    gone = store.replace(POD, [pod("c")], namespace="team")
    assert [o["metadata"]["name"] for o in gone] == ["b"]
    assert names(store) == ["c"]
    assert names(store, namespace="elsewhere") == ["x"]


def test_stored_objects_share_their_words_and_carry_no_managed_fields() -> None:
    store = Store()
    for name in ("a", "b"):
        metadata = {"name": name, "managedFields": [1], "labels": {"tier": "x"}}
        store.put(POD, json.loads(json.dumps({"metadata": metadata, "count": [1, True]})))
    first, second = store.all(POD)
    assert first == {"metadata": {"name": "a", "labels": {"tier": "x"}}, "count": [1, True]}
    assert next(iter(first["metadata"]["labels"])) is next(iter(second["metadata"]["labels"]))
