"""Late binding: who gets a replica, who waits, and that no lease is ever lost."""

from __future__ import annotations

import asyncio
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.dispatcher import Dispatcher, Lease, Turn
from octavo_gateway.errors import ModelNotFoundError, NoReplicaInTimeError, QueueFullError
from octavo_gateway.load import COLD_CONCURRENCY, LoadBook, LoadReport
from octavo_gateway.outliers import OutlierDetector
from octavo_gateway.registry import Endpoint, EndpointState, HoldPolicy, ModelEntry, Registry, Saturation, Strategy
from octavo_gateway.routing import PrefixIndex, Router, RouteRequest

ROUTE = RouteRequest("m")


class Desk:
    """A dispatcher with a hand-set clock over a registry a test can change."""

    def __init__(self) -> None:
        self.now = 0.0
        self.registry = Registry()
        self.loads = LoadBook()
        router = Router(PrefixIndex(), random.Random(1))
        self.dispatcher = Dispatcher(self.registry, router, self.loads, OutlierDetector(), lambda: self.now)

    def serve(self, *endpoints: Endpoint, **fields: object) -> ModelEntry:
        defaults: dict[str, object] = {"strategy": Strategy.LEAST_LOADED, "saturation": Saturation(queue_depth=1)}
        entry = ModelEntry("m", endpoints, **(defaults | fields))  # type: ignore[arg-type]
        self.registry.publish([entry])
        return entry

    def fill(self, entry: ModelEntry) -> list[Lease]:
        """Take leases until the next request would wait."""
        return list(iter(lambda: self.dispatcher.try_acquire(entry, ROUTE), None))

    def wait(self, entry: ModelEntry, **turn: object) -> asyncio.Task[Lease]:
        return asyncio.ensure_future(self.dispatcher.acquire(entry, ROUTE, Turn(**turn)))  # type: ignore[arg-type]


A = Endpoint("a", "http://h:1")
B = Endpoint("b", "http://h:2")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_saturated_replica_gets_no_more_and_the_rest_waits_here() -> None:
    desk = Desk()
    entry = desk.serve(A)
    leases = desk.fill(entry)
    waiting = [desk.wait(entry) for _ in range(3)]
    await settle()

    assert len(leases) == COLD_CONCURRENCY + 1
    assert desk.dispatcher.signals("m").held == 3
    desk.dispatcher.release(leases.pop())
    await settle()
    assert [w.done() for w in waiting] == [True, False, False]
    for lease in leases:
        desk.dispatcher.release(lease)
    assert len(await asyncio.gather(*waiting)) == 3


async def test_a_new_replica_serves_those_who_wait_at_once() -> None:
    desk = Desk()
    entry = desk.serve()
    waiting = [desk.wait(entry) for _ in range(3)]
    await settle()
    assert desk.dispatcher.signals("m").activation

    desk.serve(A)
    leases = await asyncio.gather(*waiting)

    assert {lease.endpoint.id for lease in leases} == {"a"}
    assert not desk.dispatcher.signals("m").activation


async def test_a_starting_or_draining_replica_gets_nothing() -> None:
    desk = Desk()
    starting, draining = (
        Endpoint("s", "http://h:3", EndpointState.STARTING),
        Endpoint("d", "http://h:4", EndpointState.DRAINING),
    )
    entry = desk.serve(starting, draining)

    assert desk.dispatcher.try_acquire(entry, ROUTE) is None


async def test_a_load_report_lets_the_next_in() -> None:
    desk = Desk()
    entry = desk.serve(A)
    desk.fill(entry)
    waiting = desk.wait(entry)
    await settle()
    assert not waiting.done()

    desk.loads["a"].update(LoadReport(waiting=0, running=9, kv_cache_utilization=0.3, at=0.0, capacity=64))
    desk.dispatcher.loads_changed()
    assert (await waiting).endpoint.id == "a"


async def test_a_full_line_refuses_at_once_with_an_honest_time() -> None:
    desk = Desk()
    entry = desk.serve(hold=HoldPolicy(max_held_requests=2, hold_timeout_s=60))
    held = [desk.wait(entry) for _ in range(2)]
    await settle()

    with pytest.raises(QueueFullError) as caught:
        await desk.dispatcher.acquire(entry, ROUTE, Turn())
    assert caught.value.retry_after_s == 30.0  # nothing known of start-up times yet
    for task in held:
        task.cancel()


async def test_retry_after_is_the_start_up_time_that_was_seen() -> None:
    desk = Desk()
    desk.serve(Endpoint("x", "http://h:1", EndpointState.STARTING))
    desk.now = 12.0
    desk.serve(Endpoint("x", "http://h:1", EndpointState.READY))
    desk.now = 20.0

    assert desk.dispatcher.retry_after_s(desk.serve()) == 12.0


async def test_retry_after_of_a_busy_model_is_its_line_over_its_rate() -> None:
    desk = Desk()
    entry = desk.serve(A)
    for _ in range(120):
        desk.now += 0.5
        lease = desk.dispatcher.try_acquire(entry, ROUTE)
        assert lease is not None
        desk.dispatcher.completed(lease)
        desk.dispatcher.release(lease)
    desk.fill(entry)
    held = [desk.wait(entry) for _ in range(20)]
    await settle()

    assert desk.dispatcher.retry_after_s(entry) == pytest.approx(10.0, rel=0.1)
    for task in held:
        task.cancel()


async def test_waiting_ends_at_the_hold_time_with_a_reason() -> None:
    desk = Desk()
    entry = desk.serve(hold=HoldPolicy(max_held_requests=5, hold_timeout_s=0.05))

    with pytest.raises(NoReplicaInTimeError, match="no replica is ready"):
        await desk.dispatcher.acquire(entry, ROUTE, Turn())
    assert desk.dispatcher.signals("m").held == 0


async def test_those_who_wait_for_a_model_that_is_removed_are_told() -> None:
    desk = Desk()
    waiting = desk.wait(desk.serve())
    await settle()
    desk.registry.publish([])

    with pytest.raises(ModelNotFoundError):
        await waiting


async def test_a_client_that_leaves_while_waiting_frees_its_place() -> None:
    desk = Desk()
    waiting = desk.wait(desk.serve())
    await settle()
    waiting.cancel()
    await settle()

    assert desk.dispatcher.signals("m").held == 0


async def test_a_lease_granted_to_a_client_that_just_left_is_given_back() -> None:
    desk = Desk()
    waiting = desk.wait(desk.serve())
    await settle()
    desk.serve(A)  # grants
    waiting.cancel()  # before the task could run
    await settle()

    assert desk.loads["a"].in_flight == 0
    assert desk.dispatcher.signals("m").in_flight == 0


async def test_tenants_share_a_freed_replica_by_weight() -> None:
    desk = Desk()
    entry = desk.serve(A)
    leases = desk.fill(entry)
    order: list[str] = []

    async def take(tenant: str) -> None:
        lease = await desk.dispatcher.acquire(
            entry, ROUTE, Turn(tenant=tenant, weight=3.0 if tenant == "gold" else 1.0)
        )
        order.append(tenant)
        leases.append(lease)

    tasks = [asyncio.ensure_future(take(t)) for t in ["free"] * 12 + ["gold"] * 12]
    await settle()
    while leases:
        desk.dispatcher.release(leases.pop(0))
        await settle()
    await asyncio.gather(*tasks)

    assert order[:8].count("gold") == 6


async def test_a_replica_that_failed_a_request_is_not_asked_again_unless_it_is_the_only_one() -> None:
    desk = Desk()
    entry = desk.serve(A, B)
    for _ in range(4):
        lease = desk.dispatcher.try_acquire(entry, ROUTE, frozenset({"a"}))
        assert lease is not None
        assert lease.endpoint.id == "b"
    only = desk.dispatcher.try_acquire(desk.serve(A), ROUTE, frozenset({"a"}))
    assert only is not None


async def test_an_adapter_goes_where_it_is_loaded_and_fails_open() -> None:
    desk = Desk()
    loaded = Endpoint("l", "http://h:9", adapters=frozenset({"sql"}))
    entry = desk.serve(A, B, loaded)
    for _ in range(3):
        lease = desk.dispatcher.try_acquire(entry, RouteRequest("m", adapter="sql"))
        assert lease is not None
        assert lease.endpoint.id == "l"
    assert desk.dispatcher.try_acquire(entry, RouteRequest("m", adapter="unknown")) is not None


async def test_a_prompt_counts_against_its_replica_until_the_first_byte_or_the_end() -> None:
    desk = Desk()
    entry = desk.serve(A)
    leases = [desk.dispatcher.try_acquire(entry, RouteRequest("m", prompt_tokens=1_000)) for _ in range(2)]
    assert desk.loads["a"].pending_tokens == 2_000
    assert leases[0] is not None
    assert leases[1] is not None

    desk.dispatcher.first_byte(leases[0])
    assert desk.loads["a"].pending_tokens == 1_000
    for lease in leases:
        assert lease is not None
        desk.dispatcher.release(lease)
    assert desk.loads["a"].pending_tokens == 0


async def test_a_lease_cannot_be_released_twice() -> None:
    desk = Desk()
    lease = desk.dispatcher.try_acquire(desk.serve(A), ROUTE)
    assert lease is not None
    desk.dispatcher.release(lease)

    with pytest.raises(RuntimeError, match="twice"):
        desk.dispatcher.release(lease)


Step = st.sampled_from(["arrive", "arrive", "arrive", "finish", "finish", "leave", "up", "down", "report"])


@settings(max_examples=60, deadline=None)
@given(st.lists(Step, max_size=60), st.randoms(use_true_random=False))
def test_under_any_interleaving_nobody_is_lost_and_every_count_returns_to_zero(
    steps: list[str], rng: random.Random
) -> None:
    async def run() -> None:
        desk = Desk()
        up: list[Endpoint] = []
        entry = desk.serve(hold=HoldPolicy(max_held_requests=10, hold_timeout_s=1e6))
        tasks: list[asyncio.Task[Lease]] = []
        for number, step in enumerate(steps):
            desk.now += 0.1
            if step == "arrive":
                tasks.append(desk.wait(entry, tenant=rng.choice("ab"), deadline=math.inf))
            elif step == "up":
                up.append(Endpoint(f"e{number}", f"http://h:{number + 1}"))
            elif step == "down" and up:
                up.pop(rng.randrange(len(up)))
            elif step == "report" and up:
                desk.loads[up[0].id].update(LoadReport(0, rng.randrange(9), rng.random(), desk.now, capacity=16))
                desk.dispatcher.loads_changed()
            elif step == "leave" and tasks:
                leaving = tasks.pop(rng.randrange(len(tasks)))
                if not leaving.cancel() and leaving.exception() is None:
                    desk.dispatcher.release(leaving.result())
            elif step == "finish":
                done = [t for t in tasks if t.done() and t.exception() is None]
                if done:
                    tasks.remove(done[0])
                    desk.dispatcher.release(done[0].result())
            if step in ("up", "down"):
                entry = desk.serve(*up, hold=entry.hold)
            if rng.random() < 0.5:
                await settle()
        for task in [t for t in tasks if t.cancelled()]:
            tasks.remove(task)
        # One healthy replica comes; everybody who still waits is served in the end.
        desk.serve(Endpoint("last", "http://h:9999"), hold=entry.hold)
        while tasks:
            await settle()
            progressed = [t for t in tasks if t.done()]
            assert progressed, "requests wait although a replica is free"
            for task in progressed:
                tasks.remove(task)
                if not isinstance(task.exception(), QueueFullError):
                    desk.dispatcher.release(task.result())
        await settle()
        signals = desk.dispatcher.signals("m")
        assert (signals.held, signals.in_flight) == (0, 0)
        assert all(desk.loads[e.id].in_flight == 0 for e in up)

    asyncio.run(run())


async def test_a_request_for_an_adapter_never_goes_to_a_replica_that_lacks_it_while_another_holds_it() -> None:
    desk = Desk()
    holder = Endpoint("holder", "http://h:1", adapters=frozenset({"sql"}))
    lacking = Endpoint("lacking", "http://h:2")
    entry = desk.serve(holder, lacking, adapters=("sql",))
    route = RouteRequest("m", adapter="sql")
    taken = [desk.dispatcher.try_acquire(entry, route) for _ in range(4 * COLD_CONCURRENCY)]
    assert {lease.endpoint.id for lease in taken if lease is not None} == {"holder"}
    unknown = desk.dispatcher.try_acquire(entry, RouteRequest("m", adapter="nobody-has-it"))
    assert unknown is not None, "a replica says itself that it does not know the adapter"
