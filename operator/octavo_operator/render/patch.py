"""Strategic merge of a patch into a pod template, with the merge keys that Kubernetes uses for pods."""

from __future__ import annotations

from typing import Any

# Lists that merge by key; every other list is replaced as a whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
}
DIRECTIVE = "$patch"


def merge(base: Any, patch: Any, key: str = "") -> Any:
    """`base` with `patch` laid over it: null removes, objects merge, keyed lists merge by key, others are replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return _merge_objects(base, patch)
    if isinstance(base, list) and isinstance(patch, list) and key in MERGE_KEYS:
        return _merge_lists(base, patch, MERGE_KEYS[key])
    return _without_directives(patch)


def _merge_objects(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    if patch.get(DIRECTIVE) == "replace":
        return {k: _without_directives(v) for k, v in patch.items() if k != DIRECTIVE}
    merged = dict(base)
    for name, value in patch.items():
        if name == DIRECTIVE:
            continue
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged[name], value, name) if name in merged else _without_directives(value)
    return merged


def _merge_lists(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    if any(isinstance(item, dict) and item == {DIRECTIVE: "replace"} for item in patch):
        return [_without_directives(item) for item in patch if item != {DIRECTIVE: "replace"}]
    merged = list(base)
    for item in patch:
        index = next((i for i, old in enumerate(merged) if _same(old, item, key)), None)
        if isinstance(item, dict) and item.get(DIRECTIVE) == "delete":
            if index is not None:
                del merged[index]
        elif index is None:
            merged.append(_without_directives(item))
        else:
            merged[index] = merge(merged[index], item)
    return merged


def _same(old: Any, new: Any, key: str) -> bool:
    return isinstance(old, dict) and isinstance(new, dict) and key in new and old.get(key) == new[key]


def _without_directives(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_directives(v) for k, v in value.items() if k != DIRECTIVE and v is not None}
    if isinstance(value, list):
        return [_without_directives(v) for v in value if not (isinstance(v, dict) and v.get(DIRECTIVE) == "delete")]
    return value
