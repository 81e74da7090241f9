"""What every part of a resource is: a frozen model with camelCase fields that refuses what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

GROUP = "serving.octavo.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


@dataclass(frozen=True)
class Rule:
    """One rule between fields, said twice: as CEL for the API server and as a predicate for everything else.

    `field` is the path, relative to the model that carries the rule, of the field an error points at.
    `holds` is None for transition rules, which compare with the stored object and only the API server can check;
    `cel` is None where the schema's own keywords already say the same. A `cluster_only` rule spares local mode.
    """

    cel: str | None
    message: str
    holds: Callable[[Any], bool] | None
    field: str = ""
    cluster_only: bool = False


class Part(BaseModel):
    """A part of a resource. Subclasses declare their `rules` beside the fields the rules guard."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    rules: ClassVar[tuple[Rule, ...]] = ()


class Observed(Part):
    """A part of a status. It may hold fields of a newer operator, which are ignored on reading."""

    model_config = ConfigDict(extra="ignore")
