"""From resources to objects: choose each service's runtime, plan it, render it. What the operator applies, offline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from octavo_operator.api.errors import FieldError, ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.api.serving_runtime import ClusterServingRuntime, ServingRuntime
from octavo_operator.api.validation import Resource
from octavo_operator.plan import Facts, Plan, Unplannable, plan
from octavo_operator.plan.runtime import choose_runtime
from octavo_operator.plan.values import ModelClaim, ModelFacts
from octavo_operator.presets import preset, preset_names
from octavo_operator.render import Object, render_plan
from octavo_operator.render.model_cache import claim_name, model_path, render_model_cache

Runtime = ServingRuntime | ClusterServingRuntime


def plan_service(service: InferenceService, runtimes: Iterable[Runtime], facts: Facts) -> Plan:
    """The plan of a service among these runtimes and the built-in ones. Raises `Unplannable`."""
    return plan(service, choose_runtime(service, with_presets(runtimes)), facts)


def with_presets(runtimes: Iterable[Runtime]) -> list[Runtime]:
    """The runtimes, and every built-in one that none of them replaces."""
    given = list(runtimes)
    names = {r.metadata.name for r in given if r.kind == "ClusterServingRuntime"}
    return [*given, *(preset(name) for name in preset_names() if name not in names)]


def render_resources(
    resources: Sequence[Resource],
    facts: Facts | None = None,
    models: Callable[[InferenceService], ModelFacts] = lambda service: ModelFacts(),
) -> tuple[list[Object], list[str]]:
    """The objects of these resources, as if the cluster held nothing else, and warnings.

    Model caches count as complete; `models` says what is known of a service's model. Raises `ManifestErrors` with
    everything that cannot be run, or is known not to fit.
    """
    runtimes: list[Runtime] = [r for r in resources if isinstance(r, ServingRuntime | ClusterServingRuntime)]
    caches = [r for r in resources if isinstance(r, ModelCache)]
    facts = facts or Facts()
    objects: list[Object] = []
    warnings: list[str] = []
    errors: list[FieldError] = []
    for cache in caches:
        objects += render_model_cache(cache, facts)
    for service in (r for r in resources if isinstance(r, InferenceService)):
        claims = {
            c.metadata.name: ModelClaim(claim_name(c), model_path(c))
            for c in caches
            if (c.metadata.namespace or "default") == service.namespace
        }
        label = f"InferenceService/{service.name}"
        try:
            known = replace(facts, model_claims={**facts.model_claims, **claims}, model=models(service))
            planned = plan_service(service, runtimes, known)
            objects += render_plan(planned)
        except Unplannable as wrong:
            errors += [replace(error, resource=label) for error in wrong.errors]
        else:
            if planned.fit is not None and not planned.fit.fits:
                message = f"does not fit its accelerator: {planned.fit.message}"
                errors.append(FieldError("spec.model", message, resource=label))
            warnings += [f"{label}: {text}" for text in planned.warnings]
            if planned.waiting_for:
                warnings.append(f"{label}: {planned.waiting_for}")
    if errors:
        raise ManifestErrors(errors)
    return objects, warnings
