"""ServiceAccount: an identity without a token, since engines never talk to the API server."""

from __future__ import annotations

from typing import Any

from octavo_operator.plan.values import Workload
from octavo_operator.render.labels import metadata


def service_account(workload: Workload) -> dict[str, Any]:
    """The ServiceAccount of a service's pods."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(workload, workload.name),
        "automountServiceAccountToken": False,
    }
