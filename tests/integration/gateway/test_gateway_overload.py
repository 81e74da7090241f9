"""Bounds hold under more than the fleet can do: cold starts, overload, dead replicas, drains."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from dataclasses import replace

from fakes.gateway_door import HELLO, Door, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import Endpoint, HoldPolicy, ModelEntry, RetryPolicy, Saturation

STREAM = HELLO | {"stream": True}
COLD = ModelEntry(name="m", scale_to_zero=True, desired_replicas=0, hold=HoldPolicy(300, hold_timeout_s=120))


async def test_five_hundred_meet_a_cold_model_with_room_for_three_hundred() -> None:
    """Streams, so that each held one hears heartbeats; the woken replica is fed no more than it can run."""
    replica = OpenAIReplica("woken", tokens=2, token_delay=0.005)
    replica.metrics = "octavo_requests_waiting 0\noctavo_requests_running 0\noctavo_max_num_seqs 16\n"
    async with open_door(COLD, connect_timeout=30) as door:
        asking = [asyncio.ensure_future(door.read(STREAM)) for _ in range(500)]
        await until(lambda: sum(task.done() for task in asking) == 200, 60)
        refused = [task.result() for task in asking if task.done()]
        await until(lambda: all(e.bytes_sent for e in door.server.app._exchanges), 60)  # a heartbeat each
        held = door.server.app.signals("m").held
        async with replica.serve():
            door.serve(replace(entry(replica), saturation=Saturation(queue_depth=2), hold=COLD.hold))
            answers = await asyncio.gather(*(task for task in asking if not task.done()))

    assert held == 300
    assert {status for status, _, _ in refused} == {429}
    assert all(int(headers["retry-after"]) >= 1 for _, _, headers in refused)
    assert {status for status, _, _ in answers} == {200}
    assert all(text.startswith(": waiting") and text.endswith("data: [DONE]\n\n") for _, text, _ in answers)
    assert replica.finished == 300
    assert replica.peak_running <= 16 + 2


async def test_at_three_times_what_the_fleet_can_do_the_line_stays_bounded_and_replicas_busy() -> None:
    """Twenty-four clients that never pause, a fleet that runs eight, room for eight to wait."""
    replicas = [OpenAIReplica(f"r{n}", tokens=2, token_delay=0.02) for n in range(2)]
    for replica in replicas:
        replica.metrics = "octavo_requests_waiting 0\noctavo_requests_running 0\noctavo_max_num_seqs 4\n"
    statuses: Counter[int] = Counter()
    retry_after: list[str | None] = []
    depths: list[int] = []

    async def client(door: Door) -> None:
        while statuses[200] < 400:
            status, _, headers = await door.read(HELLO)
            statuses[status] += 1
            if status == 429:
                retry_after.append(headers.get("retry-after"))
                await asyncio.sleep(0.01)

    async with replicas[0].serve(), replicas[1].serve():
        model = entry(*replicas, saturation=Saturation(queue_depth=1), hold=HoldPolicy(8, hold_timeout_s=60))
        async with open_door(model, connect_timeout=30) as door:
            await until(lambda: all(door.server.app.loads[r.name].report is not None for r in replicas))

            async def watch() -> None:
                while True:
                    depths.append(door.server.app.signals("m").held)
                    await asyncio.sleep(0.002)

            watching = asyncio.create_task(watch())
            await asyncio.gather(*(client(door) for _ in range(24)))
            watching.cancel()
            load = [door.server.app.loads[r.name].in_flight for r in replicas]

    assert set(statuses) == {200, 429}
    assert max(depths) == 8
    assert all(value is not None and int(value) >= 1 for value in retry_after)
    assert all(replica.peak_running <= 4 + 1 for replica in replicas)
    assert load == [0, 0]
    share = sorted(replica.finished for replica in replicas)
    assert share[0] > 0.3 * sum(share)


async def test_one_black_hole_of_four_costs_nobody_an_answer() -> None:
    """It accepts connections and stays silent. What is sent there moves on after the time for one try; then it is left
    out, and tried again with single requests only."""
    async with contextlib.AsyncExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(200)
        live = [OpenAIReplica(f"live-{n}", tokens=2, token_delay=0.01) for n in range(3)]
        for replica in live:
            await stack.enter_async_context(replica.serve())
        alone = entry(*live, retry=RetryPolicy(attempts=3, per_try_timeout_s=1.0))
        silent = Endpoint("silent", f"http://127.0.0.1:{hole.getsockname()[1]}")
        model = replace(alone, endpoints=(*alone.endpoints, silent))
        door = await stack.enter_async_context(open_door(model, connect_timeout=10))
        first = await asyncio.gather(*(door.read(HELLO) for _ in range(40)))
        before = door.server.app.metrics.page().decode()
        later = [await door.read(HELLO) for _ in range(60)]
        after = door.server.app.metrics.page().decode()

    assert {status for status, _, _ in [*first, *later]} == {200}
    assert _count(after, "per_try_timeout") - _count(before, "per_try_timeout") <= 3
    assert 'octavo_gateway_ejections_total{model="m"}' in after


async def test_a_drain_under_two_hundred_streams_loses_none() -> None:
    replica = OpenAIReplica("r", tokens=30, token_delay=0.1)
    async with replica.serve(), open_door(entry(replica), connect_timeout=30) as door:
        running = [asyncio.ensure_future(door.events(HELLO)) for _ in range(200)]
        await until(lambda: all(e.bytes_sent for e in door.server.app._exchanges) and replica.running == 200, 60)
        stopping = asyncio.ensure_future(door.server.stop(120))
        await until(lambda: door.server.app.draining)
        refused = await asyncio.gather(*(door.read(HELLO) for _ in range(20)))
        texts = await asyncio.gather(*running)
        await stopping

    assert all(text.endswith("data: [DONE]\n\n") and '"finish_reason": "stop"' in text for text in texts)
    assert {status for status, _, _ in refused} == {503}
    assert all(int(headers["retry-after"]) >= 1 for _, _, headers in refused)


def _count(page: str, reason: str) -> float:
    lines = [line for line in page.splitlines() if f'retries_total{{model="m",reason="{reason}"' in line]
    return sum(float(line.split()[-1]) for line in lines)
