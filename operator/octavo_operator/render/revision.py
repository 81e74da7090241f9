"""The revision of a service's pods: a short hash of the template, the same for the same template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from octavo_operator.render.labels import REVISION_ANNOTATION


def template_revision(template: Mapping[str, Any]) -> str:
    """The revision of a pod template, ten hexadecimal digits."""
    text = json.dumps(template, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def revision_of(objects: Iterable[Mapping[str, Any]]) -> str:
    """The revision that rendered objects carry; empty if there is no workload among them."""
    annotations = (obj["metadata"].get("annotations") or {} for obj in objects)
    return next((str(found[REVISION_ANNOTATION]) for found in annotations if REVISION_ANNOTATION in found), "")
