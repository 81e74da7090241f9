"""What a service's own pod patch may not do: leave the restricted profile, gain a token, or break the drain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from octavo_operator.api.errors import FieldError
from octavo_operator.api.kubernetes import is_code_loading

_ALLOWED_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_ALLOWED_CAPABILITIES = frozenset({"NET_BIND_SERVICE"})
_CONTAINER_LISTS = ("containers", "initContainers", "ephemeralContainers")


def refused_fields(template: Mapping[str, Any], grace_period_s: int, selector: Mapping[str, str]) -> list[FieldError]:
    """An error for everything in the patched pod template that is not allowed; paths are relative to it."""
    spec = template.get("spec") or {}
    return [
        *_labels(template, selector),
        *_pod(spec, grace_period_s),
        *_volumes(spec),
        *(error for path, container in _containers(spec) for error in _container(path, container)),
    ]


def _labels(template: Mapping[str, Any], selector: Mapping[str, str]) -> Iterator[FieldError]:
    found = (template.get("metadata") or {}).get("labels") or {}
    for name, value in selector.items():
        if found.get(name) != value:
            message = "this label selects the service's pods and cannot be changed"
            yield FieldError(f"metadata.labels[{name}]", message, repr(found.get(name)))


def _pod(spec: Mapping[str, Any], grace_period_s: int) -> Iterator[FieldError]:
    for name in ("hostNetwork", "hostPID", "hostIPC", "automountServiceAccountToken", "shareProcessNamespace"):
        if spec.get(name):
            yield FieldError(f"spec.{name}", "is not allowed", "true")
    grace = spec.get("terminationGracePeriodSeconds")
    if not isinstance(grace, int) or grace < grace_period_s:
        message = f"must be at least {grace_period_s}: propagation and drain time and 15 s; change spec.drain instead"
        yield FieldError("spec.terminationGracePeriodSeconds", message, str(grace))
    yield from _security("spec.securityContext", spec.get("securityContext") or {})
    if (spec.get("securityContext") or {}).get("runAsNonRoot") is not True:
        yield FieldError("spec.securityContext.runAsNonRoot", "must stay true")


def _volumes(spec: Mapping[str, Any]) -> Iterator[FieldError]:
    for index, volume in enumerate(spec.get("volumes") or []):
        path = f"spec.volumes[{index}]"
        for kind in volume.keys() - {"name"} - _ALLOWED_VOLUMES:
            yield FieldError(f"{path}.{kind}", f"is not allowed; use one of {', '.join(sorted(_ALLOWED_VOLUMES))}")
        for source in (volume.get("projected") or {}).get("sources") or []:
            if "serviceAccountToken" in source:
                yield FieldError(f"{path}.projected", "a service-account token is not allowed")


def _containers(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in _CONTAINER_LISTS:
        for index, container in enumerate(spec.get(name) or []):
            yield f"spec.{name}[{index}]", container


def _container(path: str, container: Mapping[str, Any]) -> Iterator[FieldError]:
    for index, variable in enumerate(container.get("env") or []):
        if is_code_loading(str(variable.get("name", ""))):
            message = "variables that change which code is loaded are not allowed"
            yield FieldError(f"{path}.env[{index}].name", message, repr(variable.get("name")))
    for index, port in enumerate(container.get("ports") or []):
        if port.get("hostPort"):
            yield FieldError(f"{path}.ports[{index}].hostPort", "is not allowed", str(port["hostPort"]))
    context = container.get("securityContext") or {}
    yield from _security(f"{path}.securityContext", context)
    if context.get("privileged"):
        yield FieldError(f"{path}.securityContext.privileged", "is not allowed", "true")
    if context.get("allowPrivilegeEscalation") is not False:
        yield FieldError(f"{path}.securityContext.allowPrivilegeEscalation", "must be false")
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield FieldError(f"{path}.securityContext.capabilities.drop", "must hold ALL")
    for capability in capabilities.get("add") or []:
        if capability not in _ALLOWED_CAPABILITIES:
            yield FieldError(f"{path}.securityContext.capabilities.add", "is not allowed", repr(capability))
    if context.get("procMount") not in (None, "Default"):
        yield FieldError(f"{path}.securityContext.procMount", "is not allowed", repr(context["procMount"]))


def _security(path: str, context: Mapping[str, Any]) -> Iterator[FieldError]:
    if context.get("runAsUser") == 0:
        yield FieldError(f"{path}.runAsUser", "must not be 0: engines do not run as root", "0")
    if context.get("runAsNonRoot") is False:
        yield FieldError(f"{path}.runAsNonRoot", "must not be false: engines do not run as root", "false")
    if (context.get("seccompProfile") or {}).get("type") == "Unconfined":
        yield FieldError(f"{path}.seccompProfile.type", "must be RuntimeDefault or Localhost", "'Unconfined'")
    if (context.get("appArmorProfile") or {}).get("type") == "Unconfined":
        yield FieldError(f"{path}.appArmorProfile.type", "must not be Unconfined", "'Unconfined'")
