"""From manifests to the workloads that this machine is to run, refusing what only a cluster can do."""

from __future__ import annotations

from collections.abc import Sequence

from octavo_operator.api.errors import FieldError, ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.manifest import load_manifests
from octavo_operator.api.validation import Resource
from octavo_operator.plan import Facts, Unplannable, Workload, local_refusals, plan
from octavo_operator.plan.values import Target


def local_workloads(files: Sequence[str]) -> tuple[list[Workload], list[str]]:
    """(workloads, warnings) of the InferenceServices in `files`; raises `ManifestErrors` with all errors at once."""
    errors: list[FieldError] = []
    try:
        resources: Sequence[Resource] = load_manifests(files, local=True)
    except ManifestErrors as wrong:
        resources, errors = wrong.valid, list(wrong.errors)
    services = [r for r in resources if isinstance(r, InferenceService)]
    warnings = [
        f"{r.kind}/{r.metadata.name} is ignored: local mode serves InferenceServices only"
        for r in resources
        if not isinstance(r, InferenceService)
    ]
    workloads: list[Workload] = []
    for service in services:
        label = f"InferenceService/{service.name}"
        try:
            planned = plan(service, facts=Facts(target=Target.LOCAL))
            found = local_refusals(service)
        except Unplannable as unplannable:
            found = [*local_refusals(service), *unplannable.errors]
        else:
            workloads += planned.workloads
            warnings += [f"{label}: {warning}" for warning in planned.warnings]
        errors += [FieldError(e.path, e.message, e.value, e.file, e.document, label) for e in found]
    errors += _name_clashes(workloads)
    if not services and not errors:
        errors.append(FieldError("", "no InferenceService found", file=", ".join(files)))
    if errors:
        raise ManifestErrors(errors)
    return workloads, warnings


def _name_clashes(workloads: Sequence[Workload]) -> list[FieldError]:
    """One address serves all models here, so their names and aliases must differ."""
    holders: dict[str, str] = {}
    errors = []
    for workload in workloads:
        for name in workload.model_names:
            holder = holders.setdefault(name, workload.service)
            if holder != workload.service:
                message = f"the model name is taken by InferenceService/{holder}; on one machine names must differ"
                label = f"InferenceService/{workload.service}"
                errors.append(FieldError("spec.model.name", message, repr(name), resource=label))
    return errors
