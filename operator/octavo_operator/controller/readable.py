"""Typed resources from raw objects, those that cannot be read left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from octavo_operator.api.base import Part
from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.api.validation import parse
from octavo_operator.controller.client import Object
from octavo_operator.plan.values import ModelClaim
from octavo_operator.render.model_cache import claim_name, model_path

log = logging.getLogger("octavo.operator")
_P = TypeVar("_P", bound=Part)


def readable(model: type[_P], objects: Iterable[Object]) -> Iterator[_P]:
    """Every object that is valid; one that is not is told in the log."""
    for raw in objects:
        try:
            yield parse(model, raw)
        except ManifestErrors as wrong:
            log.warning("%s %s is not valid: %s", model.__name__, raw["metadata"]["name"], wrong)


def model_claims(caches: Iterable[ModelCache]) -> dict[str, ModelClaim]:
    """The volumes of model caches, by the name of the cache."""
    claims = {}
    for cache in caches:
        phase = cache.status.phase if cache.status else "Pending"
        claims[cache.metadata.name] = ModelClaim(
            claim_name(cache), model_path(cache), ready=phase == "Ready", message=f"the download is {phase}"
        )
    return claims
