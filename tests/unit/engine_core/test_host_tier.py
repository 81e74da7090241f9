"""Host memory below the device's blocks: what goes there, what comes back, and what it is worth."""

from __future__ import annotations

import pytest

from fake_runner import FakeRunner, greedy
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import ConfigError
from octavo_engine.kv.block_manager import BlockManager, PrefixMatch
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.events import BlockRemoved, BlockStored
from octavo_engine.kv.host_tier import HostTier
from octavo_engine.kv.sizing import num_host_blocks
from octavo_engine.kv.transfers import Direction
from octavo_engine.messages import AddRequest, SequenceOutput
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler.limits import PreemptionMode
from octavo_engine.scheduler.preemption import CopyTime, Preemption
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel


def engine(num_blocks: int, num_host_blocks: int, **settings: object) -> EngineCore:
    config = EngineConfig(model="fake", max_num_seqs=8, max_num_batched_tokens=64, **settings)  # type: ignore[arg-type]
    runner = FakeRunner(num_blocks=num_blocks, num_host_blocks=num_host_blocks)
    core = EngineCore(runner, config, lambda: 0.0)
    host_of(core).return_rate = 1.0  # as if everything evicted had come back so far
    return core


def host_of(core: EngineCore) -> HostTier:
    assert core.scheduler.blocks.host is not None
    return core.scheduler.blocks.host


def ask(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 4) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    core.add(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))


def drain(core: EngineCore) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {}
    for _ in range(2_000):
        if not core.has_work:
            return outputs
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_an_evicted_prefix_comes_back_from_host_memory() -> None:
    core = engine(num_blocks=8, num_host_blocks=32)
    first, second = list(range(1, 25)), list(range(30, 54))
    for name, prompt in (("a", first), ("b", second)):
        ask(core, name, prompt)
        drain(core)
    ask(core, "again", first)
    outputs = drain(core)["again"]

    assert max(output.num_cached_tokens for output in outputs) == 20
    assert tokens(outputs) == greedy(first, 4)
    stats = core.stats()
    assert stats.host_hits >= 12
    assert stats.host_blocks_fetched * 4 == stats.host_hits
    assert stats.host_blocks_used == 0


def test_prompts_seen_once_are_not_kept_and_returning_ones_are() -> None:
    core = engine(num_blocks=8, num_host_blocks=2_000)
    host_of(core).return_rate = 0.0

    def say(start: int) -> int:
        prompt = [start, *range(2, 25)]
        ask(core, f"r{core.stats().step}", prompt)
        return max(output.num_cached_tokens for outputs in drain(core).values() for output in outputs)

    for start in range(1, 80):
        say(start)
    assert core.stats().host_blocks_stored == 0
    for _ in range(6):
        found = [say(start) for start in range(1, 80)]
    assert min(found) == 20
    assert core.stats().host_blocks_stored > 0


def test_a_preempted_sequence_resumes_where_it_was() -> None:
    core = engine(num_blocks=10, num_host_blocks=32, preemption_mode="swap", enable_prefix_caching=False)
    prompts = {name: [ord(name) - 90, 2, 3, 4, 5, 6] for name in "abc"}
    for name, prompt in prompts.items():
        ask(core, name, prompt, max_tokens=16)
    outputs = drain(core)

    assert {name: tokens(out) for name, out in outputs.items()} == {
        name: greedy(prompt, 16) for name, prompt in prompts.items()
    }
    stats = core.stats()
    assert stats.num_preemptions == stats.num_preemptions_by_swap > 0
    # Nothing is computed twice: each forward takes new tokens only.
    computed = sum(len(piece.token_ids) for batch in core._runner.batches for piece in batch)  # type: ignore[attr-defined]
    assert computed == sum(len(prompt) + 16 - 1 for prompt in prompts.values())


def test_without_room_in_host_memory_it_is_computed_again() -> None:
    core = engine(num_blocks=10, num_host_blocks=1, preemption_mode="swap")
    for name in "abc":
        ask(core, name, [ord(name) - 90, 2, 3, 4, 5, 6], max_tokens=16)
    outputs = drain(core)
    assert tokens(outputs["c"]) == greedy([ord("c") - 90, 2, 3, 4, 5, 6], 16)
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert stats.num_preemptions_by_swap == 0


def test_a_cancelled_sequence_gives_its_host_memory_back() -> None:
    core = engine(num_blocks=10, num_host_blocks=32, preemption_mode="swap")
    for name in "abc":
        ask(core, name, [ord(name) - 90, 2, 3, 4, 5, 6], max_tokens=16)
    while not core.stats().host_blocks_used:
        core.step()
    core.abort(["a", "b", "c"])
    assert core.stats().host_blocks_used == 0
    assert core.pool.num_used == 0


def test_a_reset_forgets_host_memory_too() -> None:
    core = engine(num_blocks=8, num_host_blocks=32)
    for start in (1, 30):
        ask(core, f"r{start}", list(range(start, start + 24)))
        drain(core)
    assert core.stats().host_blocks_cached > 0
    core.reset_prefix_cache()
    assert core.stats().host_blocks_cached == 0


def tiers(num_blocks: int, num_slots: int) -> BlockManager:
    host = HostTier(BlockPool(num_slots, 4))
    host.return_rate = 1.0
    return BlockManager(BlockPool(num_blocks, 4), host)


def sequence(manager: BlockManager, name: str, length: int, computed: int, priority: int = 0) -> Sequence:
    """A running sequence whose first positions are computed."""
    request = AddRequest(
        request_id=name, prompt_token_ids=[ord(name) - 90] * length, sampling=SamplingParams(), priority=priority
    )
    seq = Sequence(request, arrival_s=float(ord(name)))
    manager.allocate(seq.table, PrefixMatch([]), seq.tokens)
    manager.publish(seq.table, seq.tokens, computed)
    seq.num_computed = computed
    return seq


def test_copies_keep_the_order_in_which_memory_changed_hands() -> None:
    """A block is read before it is overwritten, and a slot before it is given to another block."""
    manager = tiers(num_blocks=2, num_slots=2)
    assert manager.host is not None
    a = sequence(manager, "a", 8, 8)
    manager.free(a.table)
    b = sequence(manager, "b", 8, 8)  # evicts a's blocks into the host
    manager.free(b.table)
    match = manager.match_prefix(a.table, [*a.tokens, 1])
    assert (match.blocks, len(match.slots), match.num_tokens) == ([], 2, 8)
    manager.allocate(a.table, match, a.tokens)  # fetches a while b moves out: there is room for neither to wait
    directions = [transfer.direction for transfer in manager.host.take_transfers()]
    assert directions[0] is Direction.TO_HOST
    assert directions[-1] is Direction.TO_DEVICE
    assert manager.host.pool.num_used == 0


def known(seconds_per_token: float) -> StepTimeModel:
    model = StepTimeModel()
    for size in range(1, 300):
        model.observe(StepLoad(size), 0.001 + seconds_per_token * size)
    return model


@pytest.mark.parametrize(("copy_s", "swaps"), [(1e-4, True), (1.0, False)])
def test_the_cheaper_way_is_taken(copy_s: float, swaps: bool) -> None:
    manager = tiers(8, 8)
    copy = CopyTime(0)
    copy.seconds_per_block = copy_s
    preemption = Preemption(manager, known(1e-3), PreemptionMode.AUTO, copy)
    seq = sequence(manager, "a", 16, 16)
    assert preemption.set_aside(seq) is swaps
    assert bool(seq.table.set_aside) is swaps
    match = PrefixMatch([], [0, 1], 8)
    assert bool(preemption.worth_fetching(match).slots) is swaps


def test_the_victim_frees_most_for_least_and_the_oldest_is_spared() -> None:
    manager = tiers(64, 1)
    preemption = Preemption(manager, known(1e-3), PreemptionMode.RECOMPUTE, CopyTime(0))
    oldest = sequence(manager, "a", 8, 2)
    cheap = sequence(manager, "b", 20, 4)  # has many blocks, little of them computed
    dear = sequence(manager, "c", 8, 8)
    assert preemption.victim([oldest, cheap, dear]) is cheap
    assert preemption.victim([oldest]) is oldest
    urgent = sequence(manager, "d", 20, 1, priority=-1)
    assert preemption.victim([oldest, urgent, dear]) is dear
    cheap.num_preemptions = 9
    assert preemption.victim([oldest, cheap, dear]) is dear


def test_shared_blocks_free_nothing() -> None:
    manager = tiers(64, 1)
    preemption = Preemption(manager, known(1e-3), PreemptionMode.RECOMPUTE, CopyTime(0))
    oldest, shared, alone = (sequence(manager, name, 9, 8) for name in "abc")
    twin = Sequence(AddRequest(request_id="t", prompt_token_ids=shared.tokens, sampling=SamplingParams()), 0.0)
    manager.pool.acquire(shared.table.blocks)
    twin.table.blocks = list(shared.table.blocks)
    assert preemption.victim([oldest, shared, alone]) is alone


def test_events_name_the_medium() -> None:
    core = engine(num_blocks=8, num_host_blocks=4, kv_events_endpoint="tcp://*:0")
    for start in (1, 30, 60):
        ask(core, f"r{start}", list(range(start, start + 24)))
        drain(core)
    batch = core.take_kv_events()
    assert batch is not None
    stored = [event for event in batch.events if isinstance(event, BlockStored)]
    removed = [event for event in batch.events if isinstance(event, BlockRemoved)]
    assert {event.medium for event in stored} == {event.medium for event in removed} == {"GPU", "CPU"}
    on_host = {key for event in stored if event.medium == "CPU" for key in event.block_hashes}
    assert on_host <= {key for event in removed if event.medium == "GPU" for key in event.block_hashes}


@pytest.mark.parametrize(("given", "complaint"), [(1, "does not fit 1;"), (10**15, "are free")])
def test_host_memory_that_cannot_be_had_is_refused(given: int, complaint: str) -> None:
    config = EngineConfig(model="m", kv_host_memory_bytes=given)
    with pytest.raises(ConfigError, match=complaint):
        num_host_blocks(config, FakeRunner().info, 10**9)


def test_swapping_needs_host_memory() -> None:
    with pytest.raises(ConfigError, match="preemption_mode: swap needs"):
        EngineConfig(model="m", preemption_mode="swap").validate()


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_from_its_start_again() -> None:
    manager = tiers(8, 8)
    preemption = Preemption(manager, known(1e-3), PreemptionMode.SWAP, CopyTime(0))
    seq = sequence(manager, "a", 16, 8)
    seq.wants_prompt_logprobs = True
    assert not preemption.set_aside(seq)
    seq.wants_prompt_logprobs = False
    assert preemption.set_aside(seq)
