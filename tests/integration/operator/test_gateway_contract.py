"""What a real gateway writes on its metrics page is what the operator reads there: names, labels, numbers."""

from __future__ import annotations

import random

from octavo_gateway.dispatcher import Dispatcher
from octavo_gateway.load import LoadBook
from octavo_gateway.metrics import Metrics
from octavo_gateway.outliers import OutlierDetector
from octavo_gateway.registry import Endpoint, ModelEntry, Registry, Saturation, Strategy
from octavo_gateway.routing import PrefixIndex, Router, RouteRequest
from octavo_operator.api.operations import CanaryAnalysis
from octavo_operator.autoscale.metrics import Page, parse_page
from octavo_operator.canary import TrialView, judge
from octavo_operator.canary_meter import CanaryMeter
from octavo_operator.routes import RouteView, route_view

OLD, NEW = Endpoint("old", "http://h:1"), Endpoint("new", "http://h:2", canary=True)


class Door:
    """A gateway's dispatcher and its metrics page, on a clock of the test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.registry, self.loads, self.metrics = Registry(), LoadBook(), Metrics()
        router = Router(PrefixIndex(), random.Random(1))
        self.dispatcher = Dispatcher(self.registry, router, self.loads, OutlierDetector(), lambda: self.now)
        self.metrics.watch(self.registry, self.loads, self.dispatcher.signals, self.dispatcher.tracks)
        line = Saturation(queue_depth=1_000)
        self.entry = ModelEntry(
            "chat", (OLD, NEW), namespace="team", strategy=Strategy.LEAST_LOADED, saturation=line, canary_weight=50
        )
        self.registry.publish([self.entry])

    def serve(self, requests: int, old_s: float, new_s: float) -> None:
        for _ in range(requests):
            lease = self.dispatcher.try_acquire(self.entry, RouteRequest("chat"))
            assert lease is not None
            self.now += new_s if lease.endpoint.canary else old_s
            self.dispatcher.first_byte(lease)
            self.dispatcher.completed(lease)
            self.dispatcher.release(lease)

    def page(self) -> Page:
        return parse_page(self.metrics.page().decode(), self.now)


def test_a_slower_revision_is_seen_through_the_gateways_page() -> None:
    door, meter = Door(), CanaryMeter()
    meter.begin("new", 0)
    meter.add({"gateway-1": door.page()}, "chat", "team")
    door.serve(200, old_s=0.100, new_s=0.101)
    meter.add({"gateway-1": door.page()}, "chat", "team")
    assert (meter.stable.requests, meter.canary.requests) == (100, 100)
    view = TrialView("new", "old", 2, 1, 1, stable_counts=meter.stable, canary_counts=meter.canary)
    assert judge(view, CanaryAnalysis()) == ""
    meter.begin("new", 1)
    door.serve(200, old_s=0.100, new_s=0.150)
    meter.add({"gateway-1": door.page()}, "chat", "team")
    view = TrialView("new", "old", 2, 1, 1, stable_counts=meter.stable, canary_counts=meter.canary)
    assert "maxTTFTRatio" in judge(view, CanaryAnalysis()), "half as slow again is above 1.2"


def test_a_published_route_and_a_taken_name_are_seen_through_the_gateways_page() -> None:
    page = Door().page()
    assert route_view([page], 1, "chat", "team") == RouteView(1, 1, 1)
    assert route_view([page], 1, "chat", "other") == RouteView(1, 1, 0, taken_by="team")
    assert route_view([page], 1, "unknown", "team") == RouteView(1, 1, 0)
