"""The scheduler on a simulated clock: budget, fairness, latency target and memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo_engine.kv.block_manager import BlockManager
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.fairness import OUTPUT_TOKEN_COST, VirtualTokens
from octavo_engine.scheduler.limits import ITL_STRETCH, SchedulerLimits
from octavo_engine.scheduler.prefill import STEPS_BETWEEN_PAUSES
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.simulation import SimulatedRequest, Simulation, SimulationResult
from octavo_engine.scheduler.step_time import StepLoad
from scheduler_examples import limits, sequence, tokens, true_cost

TRACE = st.lists(
    st.builds(
        lambda name, arrival, prompt, output, tenant, priority: (name, arrival, prompt, output, tenant, priority),
        st.uuids().map(str),
        st.floats(0.0, 1.0),
        st.integers(1, 300),
        st.integers(1, 40),
        st.sampled_from(["a", "b", "c"]),
        st.integers(-1, 1),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(
    trace=TRACE,
    num_blocks=st.integers(24, 60),
    itl_target_s=st.sampled_from([0.0, 0.005, 0.05]),
    num_host_blocks=st.sampled_from([0, 5, 60]),
    copy_seconds=st.sampled_from([1e-6, 1e-2]),
)
def test_every_request_gets_all_its_tokens_and_every_decode_one_a_step(
    trace: list[tuple[str, float, int, int, str, int]],
    num_blocks: int,
    itl_target_s: float,
    num_host_blocks: int,
    copy_seconds: float,
) -> None:
    rng = random.Random(len(trace))
    requests = [
        SimulatedRequest(name, arrival, tokens(rng, prompt), output, tenant, priority)
        for name, arrival, prompt, output, tenant, priority in trace
    ]
    decoding: set[str] = set()

    def check(scheduler: Scheduler, batch: Batch) -> None:
        assert batch.num_tokens == sum(len(piece.token_ids) for piece in batch.slices) <= 64
        assert scheduler.num_running <= 8
        assert bool(batch.slices) == bool(scheduler.num_running)
        in_batch = {seq.request_id for seq in batch.sequences}
        still_running = {seq.request_id for seq in scheduler.sequences() if seq.table.blocks}
        assert decoding & still_running <= in_batch
        decoding.clear()
        decoding.update(
            seq.request_id
            for seq, piece in zip(batch.sequences, batch.slices, strict=True)
            if piece.start + len(piece.token_ids) == len(seq.tokens)
        )

    simulation = Simulation(
        limits(itl_target_s=itl_target_s),
        num_blocks=num_blocks,
        step_seconds=true_cost,
        on_step=check,
        num_host_blocks=num_host_blocks,
        copy_seconds=copy_seconds,
    )
    result = simulation.run(requests, max_steps=20_000)
    assert all(len(t.token_times_s) == t.request.num_output_tokens for t in result.timelines.values())
    assert simulation.pool.num_used == 0


def test_a_short_prompt_is_not_held_up_by_long_ones() -> None:
    rng = random.Random(0)
    long = [SimulatedRequest(f"long{i}", 0.0, tokens(rng, 4_000), 5) for i in range(3)]
    short = SimulatedRequest("short", 0.001, tokens(rng, 12), 5)
    result = Simulation(limits(), num_blocks=2_000, step_seconds=true_cost).run([*long, short])
    assert result.timelines["short"].ttft_s < 0.02
    alone = Simulation(limits(), num_blocks=2_000, step_seconds=true_cost).run(long)
    slowest = max(result.timelines[request.name].ttft_s for request in long)
    assert slowest < 1.15 * max(alone.timelines[request.name].ttft_s for request in long)


def test_prefill_chunks_keep_the_latency_target_of_running_decodes() -> None:
    rng = random.Random(1)
    decodes = [SimulatedRequest(f"chat{i}", 0.0, tokens(rng, 50), 400) for i in range(8)]
    long = [SimulatedRequest(f"long{i}", 0.5 + i / 2, tokens(rng, 20_000), 1) for i in range(3)]
    wide = limits(max_num_seqs=16, max_num_batched_tokens=4_096, itl_target_s=0.02)
    result = Simulation(wide, num_blocks=8_000, step_seconds=true_cost).run([*decodes, *long])
    assert result.gap_s(lambda r: r.name.startswith("chat"), 0.99) < 0.025
    constant = limits(max_num_seqs=16, max_num_batched_tokens=4_096)
    careless = Simulation(constant, num_blocks=8_000, step_seconds=true_cost).run([*decodes, *long])
    assert careless.gap_s(lambda r: r.name.startswith("chat"), 0.99) > 0.08
    assert result.seconds < 1.1 * careless.seconds


@settings(max_examples=8, deadline=None)
@given(
    num_streams=st.integers(1, 48),
    length=st.integers(12_000, 40_000),
    late_s=st.floats(0.0, 0.9),
    noise=st.sampled_from([0.0, 0.05, 0.1]),
)
@example(num_streams=4, length=32_000, late_s=0.5, noise=0.0)
def test_a_long_prompt_takes_all_the_time_that_the_streams_beside_it_can_spare(
    num_streams: int, length: int, late_s: float, noise: float
) -> None:
    """Streams keep three times their idle pace, so a third of each step is theirs: the long prompt cannot end before
    1.5 times its own work is done, and must not end much later. A short prompt behind it hardly waits."""
    rng = random.Random(num_streams)
    streams = [SimulatedRequest(f"s{i}", 0.0, tokens(rng, 60), 800) for i in range(num_streams)]
    long = SimulatedRequest("long", 1.0, tokens(rng, length), 10)
    work_s = true_cost(StepLoad(length, 0, length * length // 2)) - true_cost(StepLoad(0))
    late = SimulatedRequest("late", 1.0 + late_s * work_s, tokens(rng, 100), 10)
    own = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=8_192, itl_target_s=0.05, itl_stretch=ITL_STRETCH)

    def run(*requests: SimulatedRequest) -> SimulationResult:
        noises = random.Random(length)
        simulation = Simulation(
            own,
            num_blocks=6_000,
            step_seconds=lambda load: true_cost(load) * noises.uniform(1 - noise, 1 + noise),
        )
        return simulation.run([*streams, *requests])

    idle, idle_late, beside = run(), run(late), run(long, late)

    def is_stream(request: SimulatedRequest) -> bool:
        return request.name[0] == "s"

    idle_s = idle.gap_s(is_stream, 0.5)
    assert beside.gap_s(is_stream, 0.99) <= 3 * idle_s * (1 + noise / 2)
    chunk_s = max(beside.timelines["s0"].gaps_s)
    assert beside.timelines["late"].ttft_s <= 2 * idle_late.timelines["late"].ttft_s + chunk_s
    floor_s = work_s / (1 - 1 / 3)
    assert beside.timelines["long"].ttft_s <= (1.1 + 2 * noise) * floor_s


def test_every_prompt_advances_in_every_step_that_has_prefills_however_many_short_ones_come() -> None:
    rng = random.Random(7)
    chats = [SimulatedRequest(f"chat{i}", i / 40, tokens(rng, 200), 20) for i in range(120)]
    long = SimulatedRequest("long", 0.5, tokens(rng, 20_000), 2)
    own = limits(max_num_seqs=32, max_num_batched_tokens=2_048, itl_target_s=0.05, itl_stretch=ITL_STRETCH)

    advances: list[bool] = []

    def check(scheduler: Scheduler, batch: Batch) -> None:
        seq = scheduler.get("long")
        if seq is not None and seq.table.blocks:
            advances.append(seq in batch.sequences)
            assert advances[-1] or not batch.prefill_pairs

    Simulation(own, num_blocks=4_000, step_seconds=true_cost, on_step=check).run([*chats, long])
    assert advances.count(False) <= 1 + len(advances) // STEPS_BETWEEN_PAUSES


def test_swapping_ends_an_overload_sooner_where_copies_are_cheap() -> None:
    rng = random.Random(5)
    trace = [SimulatedRequest(f"r{i}", i / 20, tokens(rng, 900), 400) for i in range(24)]

    def run(num_host_blocks: int) -> SimulationResult:
        simulation = Simulation(
            limits(max_num_seqs=24, max_num_batched_tokens=2_048, itl_target_s=0.05, growth_reserve=0.0),
            num_blocks=900,
            step_seconds=true_cost,
            num_host_blocks=num_host_blocks,
            copy_seconds=2e-5,
        )
        result = simulation.run(trace)
        assert simulation.pool.num_used == simulation.host.pool.num_used == 0
        return result

    recomputed, swapped = run(0), run(4_000)

    assert swapped.num_swapped > 0
    assert swapped.seconds < recomputed.seconds


def test_no_step_of_a_slow_model_is_longer_than_it_may_be() -> None:
    longest = 0.0

    def slow(load: StepLoad) -> float:
        nonlocal longest
        seconds = 0.2 + 0.05 * load.num_tokens
        longest = max(longest, seconds)
        return seconds

    rng = random.Random(7)
    requests = [SimulatedRequest(f"r{i}", 0.0, tokens(rng, 700), 3) for i in range(3)]
    careful = limits(max_num_batched_tokens=1_024, itl_target_s=0.2, max_step_s=7.5)
    Simulation(careful, num_blocks=2_000, step_seconds=slow).run(requests)
    assert 5.0 < longest < 8.0


def test_a_head_that_does_not_fit_is_overtaken_a_bounded_number_of_times() -> None:
    rng = random.Random(2)
    first = SimulatedRequest("first", 0.0, tokens(rng, 400), 200)
    big = SimulatedRequest("big", 0.01, tokens(rng, 700), 5)
    small = [SimulatedRequest(f"small{i}", 0.02, tokens(rng, 30), 3) for i in range(40)]
    started: list[str] = []

    def note(_: Scheduler, batch: Batch) -> None:
        started.extend(seq.request_id for seq in batch.sequences if seq.request_id not in started)

    Simulation(limits(max_overtakes=10), num_blocks=64, step_seconds=true_cost, on_step=note).run([first, big, *small])
    assert started[0] == "first"
    assert started.index("big") == 1 + 10


@pytest.mark.parametrize("caching", [True, False])
def test_equal_prompts_that_arrive_together_are_computed_once(caching: bool) -> None:
    rng = random.Random(6)
    shared = tokens(rng, 400)
    requests = [SimulatedRequest(f"r{i}", 0.0, (*shared, i), 10) for i in range(8)]
    computed = 0

    def count(_: Scheduler, batch: Batch) -> None:
        nonlocal computed
        computed += sum(len(piece.token_ids) for piece in batch.slices)

    simulation = Simulation(limits(), num_blocks=500, step_seconds=true_cost, enable_caching=caching, on_step=count)
    result = simulation.run(requests)
    assert all(t.finished_s is not None for t in result.timelines.values())
    assert (computed < 700) == caching


def test_who_waits_for_a_prefix_starts_when_its_owner_is_gone() -> None:
    scheduler = Scheduler(limits(), BlockManager(BlockPool(500, 16)))
    owner, follower = sequence("owner", prompt=400), sequence("follower", prompt=400)
    scheduler.add(owner)
    scheduler.add(follower)
    assert scheduler.schedule(0.0).sequences == [owner]
    assert scheduler.schedule(0.0).sequences == [owner]
    scheduler.finish(owner)
    assert scheduler.schedule(0.0).sequences == [follower]


def test_requests_past_their_deadline_end_without_holding_memory() -> None:
    rng = random.Random(3)
    requests = [SimulatedRequest(f"r{i}", 0.0, tokens(rng, 200), 200, deadline_s=0.2) for i in range(20)]
    simulation = Simulation(limits(), num_blocks=200, step_seconds=true_cost)
    result = simulation.run(requests)
    assert all(t.expired for t in result.timelines.values())
    assert simulation.pool.num_used == 0


def test_deadlines_of_requests_that_have_ended_are_forgotten() -> None:
    scheduler = Scheduler(limits(), BlockManager(BlockPool(500, 16)))
    for i in range(10_000):
        seq = sequence(f"r{i}", deadline_s=3_600.0)
        scheduler.add(seq)
        scheduler.finish(seq)
    assert len(scheduler._deadlines) < 2_000


def test_a_flooding_tenant_does_not_delay_a_quiet_one() -> None:
    rng = random.Random(4)
    flood = [SimulatedRequest(f"flood{i}", 0.0, tokens(rng, 100), 30, "flood") for i in range(300)]
    quiet = [SimulatedRequest(f"quiet{i}", 0.2 + i / 10, tokens(rng, 100), 30, "quiet") for i in range(20)]
    result = Simulation(limits(), num_blocks=500, step_seconds=true_cost).run([*flood, *quiet])
    assert result.ttft_s(lambda r: r.tenant == "quiet", 0.99) < 0.5
    assert result.ttft_s(lambda r: r.tenant == "flood", 0.99) > 3.0


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_backlogged_tenants_receive_service_by_weight(weight: float) -> None:
    rng = random.Random(5)
    requests = [
        SimulatedRequest(f"{tenant}{i}", 0.0, tokens(rng, length), output, tenant)
        for tenant, length, output in (("a", 20, 40), ("b", 200, 10))
        for i in range(150)
    ]
    service = {"a": 0.0, "b": 0.0}

    def count(scheduler: Scheduler, batch: Batch) -> None:
        if min(sum(seq.tenant == name for seq in scheduler.sequences()) for name in service) < 20:
            return
        for seq, piece in zip(batch.sequences, batch.slices, strict=True):
            generates = piece.start >= seq.num_prompt_tokens
            service[seq.tenant] += OUTPUT_TOKEN_COST if generates else len(piece.token_ids)

    fair = limits(tenant_weights={"a": weight})
    Simulation(fair, num_blocks=500, step_seconds=true_cost, enable_caching=False, on_step=count).run(requests)
    assert service["a"] / service["b"] == pytest.approx(weight, rel=0.25)


def test_an_idle_tenant_earns_no_credit() -> None:
    counters = VirtualTokens()
    counters.enter("busy")
    counters.charge_prompt("busy", 1_000)
    counters.pick("busy")
    counters.enter("back")
    assert counters.service("back") == 1_000


def test_a_tenant_cannot_shed_its_debt_by_leaving() -> None:
    counters = VirtualTokens()
    counters.enter("a")
    counters.charge_output("a", 50)
    counters.leave("a")
    counters.enter("a")
    assert counters.service("a") == 50 * OUTPUT_TOKEN_COST


def test_queued_work_and_the_time_to_come_back_grow_with_the_queue() -> None:
    scheduler = Scheduler(limits(max_queued_requests=100), BlockManager(BlockPool(500, 16)))
    for _ in range(50):
        scheduler.step_time.observe(StepLoad(64), 0.5)
        scheduler.step_time.observe(StepLoad(8), 0.1)
    assert scheduler.queued_work_s == 0.0
    work = []
    for i in range(30):
        scheduler.add(sequence(f"r{i}", prompt=50))
        work.append(scheduler.queued_work_s)
    assert work == sorted(work)
    assert work[-1] > 10.0
    assert 1.0 <= scheduler.retry_after_s <= 60.0
