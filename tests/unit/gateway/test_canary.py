"""A canary gets its share of the requests and never more, and both tracks are counted."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.canary import Track
from octavo_gateway.dispatcher import Dispatcher, Lease, Turn
from octavo_gateway.load import LoadBook
from octavo_gateway.metrics import Metrics
from octavo_gateway.outliers import OutlierDetector
from octavo_gateway.registry import Endpoint, EndpointState, ModelEntry, Registry, Saturation, Strategy
from octavo_gateway.routing import PrefixIndex, Router, RouteRequest

ROUTE = RouteRequest("m")
OLD = Endpoint("old", "http://h:1")
NEW = Endpoint("new", "http://h:2", canary=True)


class Door:
    """A dispatcher with a hand-set clock over one model."""

    def __init__(self, weight: int | None, *endpoints: Endpoint, queue_depth: int = 1_000) -> None:
        self.now = 0.0
        self.registry = Registry()
        router = Router(PrefixIndex(), random.Random(1))
        self.loads = LoadBook()
        self.dispatcher = Dispatcher(self.registry, router, self.loads, OutlierDetector(), lambda: self.now)
        self.queue_depth = queue_depth
        self.entry = self.publish(weight, *endpoints)

    def publish(self, weight: int | None, *endpoints: Endpoint) -> ModelEntry:
        line = Saturation(queue_depth=self.queue_depth)
        entry = ModelEntry("m", endpoints, strategy=Strategy.LEAST_LOADED, saturation=line, canary_weight=weight)
        self.registry.publish([entry])
        return entry

    def take(self, excluded: frozenset[str] = frozenset()) -> Lease | None:
        return self.dispatcher.try_acquire(self.entry, ROUTE, excluded)

    def serve(self, excluded: frozenset[str] = frozenset()) -> str:
        lease = self.take(excluded)
        assert lease is not None
        self.dispatcher.release(lease)
        return lease.endpoint.id


@settings(deadline=None)
@given(st.integers(1, 99), st.integers(1, 400))
def test_the_canary_gets_exactly_its_weight_at_every_moment(weight: int, requests: int) -> None:
    door = Door(weight, OLD, NEW)
    served = 0
    for count in range(1, requests + 1):
        served += door.serve() == "new"
        assert count * weight / 100 - 1 - 1e-6 < served <= count * weight / 100 + 1e-6


def test_a_canary_that_has_not_begun_gets_nothing() -> None:
    door = Door(0, OLD, NEW)
    assert {door.serve() for _ in range(200)} == {"old"}


def test_without_a_canary_all_replicas_share() -> None:
    door = Door(None, OLD, NEW)
    assert {door.serve() for _ in range(4)} == {"old", "new"}


def test_a_busy_canary_leaves_its_turn_to_the_others_and_gets_at_most_one_later() -> None:
    door = Door(50, OLD)
    assert {door.serve() for _ in range(100)} == {"old"}
    door.entry = door.publish(50, OLD, NEW)
    first = [door.serve() for _ in range(10)]
    assert first.count("new") <= 6


def test_a_canary_serves_when_no_other_replica_is_ready() -> None:
    starting = Endpoint("old", "http://h:1", EndpointState.STARTING)
    assert Door(5, starting, NEW).serve() == "new"


async def test_requests_wait_for_a_busy_stable_replica_rather_than_exceed_the_share() -> None:
    door = Door(1, OLD, NEW, queue_depth=1)
    leases = list(iter(door.take, None))
    assert {lease.endpoint.id for lease in leases} == {"old"}
    waiting = asyncio.ensure_future(door.dispatcher.acquire(door.entry, ROUTE, Turn()))
    await asyncio.sleep(0)
    assert not waiting.done()
    door.dispatcher.release(leases.pop())
    assert (await waiting).endpoint.id == "old"


def test_a_request_that_the_canary_failed_is_retried_on_the_stable_revision() -> None:
    door = Door(99, OLD, NEW)
    assert {door.serve(excluded=frozenset({"new"})) for _ in range(20)} == {"old"}


def test_both_tracks_are_counted_and_told_only_while_a_canary_runs() -> None:
    door = Door(50, OLD, NEW)
    metrics = Metrics()
    metrics.watch(door.registry, door.loads, door.dispatcher.signals, door.dispatcher.tracks)
    for _ in range(4):
        lease = door.take()
        assert lease is not None
        door.now += 0.4 if lease.endpoint.canary else 0.1
        if lease.endpoint.canary:
            door.dispatcher.failed(lease)
        else:
            door.dispatcher.first_byte(lease)
        door.dispatcher.completed(lease)
        door.dispatcher.release(lease)
    lease = door.take()
    assert lease is not None
    door.dispatcher.abandoned(lease)  # its client left: that says nothing of the replica
    door.dispatcher.release(lease)
    tracks = door.dispatcher.tracks("m")
    assert (tracks[Track.STABLE].requests, tracks[Track.STABLE].errors) == (2, 0)
    assert (tracks[Track.CANARY].requests, tracks[Track.CANARY].errors) == (2, 2)
    page = metrics.page().decode()
    assert 'octavo_gateway_track_errors_total{model="m",namespace="",track="canary"} 2.0' in page
    assert 'octavo_gateway_track_first_byte_seconds_count{model="m",namespace="",track="stable"} 2.0' in page
    door.publish(None, OLD)
    assert "octavo_gateway_track_requests_total{" not in metrics.page().decode()
