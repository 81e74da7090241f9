"""What the gateways say of a service's route: who knows it, and whether somebody else holds its name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo_operator.autoscale.metrics import Page

KNOWN_MODELS = "octavo_gateway_endpoints"  # one sample for each state of a model's replicas, even where there are none


@dataclass(frozen=True)
class RouteView:
    """How many gateways there are, how many of them answered, and how many of those serve the model."""

    gateways: int = 0
    answering: int = 0
    serving: int = 0
    taken_by: str = ""  # namespace whose service has the model's name


def route_view(pages: Sequence[Page], gateways: int, model: str, namespace: str) -> RouteView:
    """The view of one service, from the metrics pages of the gateways that answered."""
    serving, taken_by = 0, ""
    for page in pages:
        holders = {sample.labels.get("namespace", "") for sample in page.of_model(KNOWN_MODELS, model)}
        serving += namespace in holders
        taken_by = next((holder for holder in sorted(holders) if holder != namespace), taken_by)
    return RouteView(gateways, len(pages), serving, taken_by)
