"""Errors in manifests: where, what, and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class FieldError:
    """One error of a manifest. `path` is the field, such as spec.model.storageUri; `document` counts from 0."""

    path: str
    message: str
    value: str = ""
    file: str = ""
    document: int = 0
    resource: str = ""

    def __str__(self) -> str:
        where = ": ".join(filter(None, (self.place, self.path)))
        return f"{where}: {self.message}" + (f" (got {self.value})" if self.value else "")

    @property
    def place(self) -> str:
        """File, document and resource, as far as known."""
        document = f" document {self.document + 1}" if self.file else ""
        resource = f" ({self.resource})" if self.resource else ""
        return f"{self.file}{document}{resource}"


class OctavoOperatorError(Exception):
    """Base of the errors that the control plane raises on purpose."""


class ManifestErrors(OctavoOperatorError):  # noqa: N818 - it is many errors
    """Everything that is wrong with the manifests, at once. `valid` are the resources that are right."""

    def __init__(self, errors: Sequence[FieldError], valid: Sequence[Any] = ()) -> None:
        self.errors = tuple(errors)
        self.valid = tuple(valid)
        super().__init__("\n".join(str(error) for error in self.errors))
