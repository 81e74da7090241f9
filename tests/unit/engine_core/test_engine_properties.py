"""Whatever is added, cancelled, preempted or late: nothing leaks, nothing starves, and no block has foreign content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_runner import CRASH, NAN, FakeRunner, greedy
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import InvalidRequestError, QueueFullError
from octavo_engine.lora.adapter import Adapter
from octavo_engine.messages import AddRequest, FinishReason
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler.sequence import Sequence as Seq
from octavo_engine.scheduler.sequence import SequenceState
from octavo_engine.stepping.device_queue import CallerQueue, ThreadQueue

# Few distinct tokens and a common start: prefixes are shared often.
PROMPTS = st.builds(
    lambda shared, own: [1, 2, 3, 4, 5, 6, 7, 8, 9][:shared] + own,
    st.integers(0, 9),
    st.lists(st.integers(1, 3), min_size=1, max_size=14),
)
ADD = st.tuples(
    st.just("add"),
    PROMPTS,
    st.integers(1, 12),
    st.integers(-2, 2),
    st.sampled_from(["", "x"]),
    st.one_of(st.none(), st.floats(0.5, 20.0)),
    st.sampled_from([0, 0, 0, 0, 0, 0, CRASH, NAN]),
    st.sampled_from(["", "", "", "a", "b", "c"]),
)
# Steps one after the other; ahead on a thread, as for a CPU; ahead by calls that return at once, as for a GPU.
# Over three stages, each with a step of its own sequences.
QUEUES = {"off": CallerQueue, "thread": ThreadQueue, "caller": CallerQueue, "stages": CallerQueue}
NUM_IN_FLIGHT = {"off": 0, "thread": 1, "caller": 1, "stages": 2}
ADAPTERS = ("a", "b", "c")
ACTIONS = st.lists(
    st.one_of(
        ADD,
        ADD,
        st.tuples(st.just("abort"), st.integers(0, 40)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("wait"), st.floats(0.0, 5.0)),
        st.tuples(st.just("reset")),
    ),
    max_size=40,
)


class StagedRunner(FakeRunner):
    """The first of three stages."""

    num_stages = 3

    def begin(self, slices: Sequence[SequenceSlice]) -> Callable[[], torch.Tensor]:
        logits = self.forward(slices)
        return lambda: logits


@dataclass
class World:
    """An engine under test, what was asked of it, and what it answered."""

    num_blocks: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool
    num_speculative_tokens: int = 0
    num_host_blocks: int = 0
    preemption_mode: str = "auto"
    ahead: str = "off"
    now: float = 0.0
    prompts: dict[str, tuple[list[int], int, str]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = (StagedRunner if self.ahead == "stages" else FakeRunner)(
            num_blocks=self.num_blocks, block_size=4, max_model_len=64, num_host_blocks=self.num_host_blocks
        )
        config = EngineConfig(
            model="fake",
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_num_partial_prefills=2,
            max_queued_requests=30,
            enable_prefix_caching=self.prefix_caching,
            num_speculative_tokens=self.num_speculative_tokens,
            enable_lora=True,
            max_loras=2,
            preemption_mode=self.preemption_mode,
            async_scheduling="off" if self.ahead == "off" else "on",
        )
        self.core = EngineCore(self.runner, config, lambda: self.now, queue=QUEUES[self.ahead]())
        if self.core.scheduler.blocks.host is not None:
            self.core.scheduler.blocks.host.return_rate = 1.0  # whatever is evicted goes there
        assert self.core.adapters is not None
        self.adapters = self.core.adapters.slots
        for name in ADAPTERS:
            self.adapters.add(Adapter(name, "", f"weights of {name}", rank=1))

    def act(self, action: tuple) -> None:  # type: ignore[type-arg]
        kind = action[0]
        if kind == "add":
            self.add(*action[1:])
        elif kind == "abort":
            self.core.abort([f"r{action[1]}"])
            self.check_blocks()
        elif kind == "wait":
            self.now += action[1]
        elif kind == "reset":
            self.core.reset_prefix_cache()
        else:
            for _ in range(action[1]):
                self.step()

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        priority: int,
        salt: str,
        deadline: float | None,
        poison: int,
        adapter: str,
    ) -> None:
        name = f"r{len(self.prompts)}"
        prompt = [*prompt, poison] if poison else prompt
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = AddRequest(
            request_id=name,
            prompt_token_ids=prompt,
            sampling=sampling,
            priority=priority,
            cache_salt=salt,
            deadline_s=deadline,
            adapter=adapter,
        )
        try:
            self.core.add(request)
        except (InvalidRequestError, QueueFullError):
            return
        self.prompts[name] = (prompt, max_tokens, adapter)
        self.tokens[name] = []

    def step(self) -> None:
        self.now += 0.01
        scheduler = self.core.scheduler
        deciding = [seq for seq in scheduler.sequences() if seq.state is SequenceState.RUNNING]
        before = {seq.request_id: (seq.length, seq.num_launched) for seq in deciding}
        self.runner.batches.clear()
        output = self.core.step()
        if self.runner.batches:
            assert sum(len(piece.token_ids) for piece in self.runner.batches[0]) <= self.budget
        for item in output.outputs:
            assert item.request_id not in self.reasons, "output after the end"
            self.tokens[item.request_id].extend(item.token_ids)
            if item.finish_reason is not None:
                self.reasons[item.request_id] = item.finish_reason
        for seq in deciding:
            length, computed = before[seq.request_id]
            if seq.state is SequenceState.RUNNING and length - computed == 1 and not seq.num_preemptions:
                got_token = seq.length > length or seq.drafted or self.ahead == "stages"
                assert got_token, "a decoding sequence got no token"
        self.check_blocks()

    def check_blocks(self) -> None:
        """References equal holders; a block shared by two sequences holds the same prefix of both."""
        pool = self.core.pool
        running = [seq for seq in self.core.scheduler.sequences() if seq.state is SequenceState.RUNNING]
        running += self.ended_in_flight()
        holders = Counter(block for seq in running for block in seq.table.blocks)
        assert all(pool.references(block) == holders[block] for block in range(pool.num_blocks))
        assert pool.num_used == len(holders)
        self.check_host()
        pins = Counter(seq.adapter.adapter.name for seq in running if seq.adapter is not None)
        assert {a.name: a.num_running for a in self.adapters.stats()} == {name: pins[name] for name in ADAPTERS}
        contents: dict[int, tuple[tuple[int, ...], bytes]] = {}
        for seq in running:
            assert len(set(seq.table.blocks)) == len(seq.table.blocks)
            for index, block in enumerate(seq.table.blocks):
                content = (tuple(seq.tokens[: (index + 1) * 4]), seq.table.root)
                assert contents.setdefault(block, content) == content
                assert pool.key_of(block) is None or (index + 1) * 4 <= seq.num_computed, "published before computed"

    def ended_in_flight(self) -> list[Seq]:
        """Sequences that ended while a step that writes their blocks is in flight."""
        steps = self.core._steps._in_flight
        assert len(steps) <= NUM_IN_FLIGHT[self.ahead], "too many steps in flight"
        return [seq for step in steps for seq in step.scheduled.sequences if seq.state is SequenceState.FINISHED]

    def check_host(self) -> None:
        """Host slots are held by sequences that were set aside, and by nobody else."""
        host = self.core.scheduler.blocks.host
        if host is None:
            return
        holders = Counter(slot for seq in self.core.scheduler.sequences() for slot in seq.table.set_aside)
        assert all(host.pool.references(slot) == holders[slot] for slot in range(host.pool.num_blocks))
        assert all(
            seq.state is SequenceState.WAITING or not seq.table.set_aside for seq in self.core.scheduler.sequences()
        )

    def run_to_idle(self) -> None:
        longest = 64 + 12
        for _ in range(longest * (len(self.prompts) + 1) * (1 + NUM_IN_FLIGHT[self.ahead])):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("a sequence starved")


@settings(max_examples=100, deadline=None)
@given(
    actions=ACTIONS,
    num_blocks=st.integers(8, 24),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(1, 24),
    prefix_caching=st.booleans(),
    num_host_blocks=st.sampled_from([0, 3, 12, 40]),
    preemption_mode=st.sampled_from(["auto", "recompute", "swap"]),
    ahead=st.sampled_from(list(QUEUES)),
)
def test_any_sequence_of_events_ends_with_the_right_tokens_and_no_block_lost(
    actions: list[tuple],  # type: ignore[type-arg]
    num_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
    prefix_caching: bool,
    num_host_blocks: int,
    preemption_mode: str,
    ahead: str,
) -> None:
    budget = max_num_seqs + extra_budget
    host = (num_host_blocks, preemption_mode, ahead)
    world = World(num_blocks, max_num_seqs, budget, prefix_caching, 0, *host)
    check(world, actions)


def crowd(random: Random) -> list[tuple]:  # type: ignore[type-arg]
    """Events as they come under load: many requests, some of them cancelled, late or poisoned."""
    actions: list[tuple] = []  # type: ignore[type-arg]
    for _ in range(80):
        kind = random.choices(["add", "abort", "step", "wait", "reset"], [10, 2, 8, 1, 1])[0]
        if kind == "add":
            prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9][: random.randrange(10)] + random.choices(
                [1, 2, 3], k=random.randint(1, 14)
            )
            deadline = random.uniform(0.2, 5.0) if random.random() < 0.1 else None
            poison = random.choice([CRASH, NAN]) if random.random() < 0.08 else 0
            salt = random.choice(["", "x"])
            adapter = random.choice(["", "", *ADAPTERS])
            priority = random.randint(-2, 2)
            actions.append((kind, prompt, random.randint(1, 12), priority, salt, deadline, poison, adapter))
        elif kind == "wait":
            actions.append((kind, random.uniform(0.0, 1.0)))
        elif kind == "reset":
            actions.append((kind,))
        else:
            actions.append((kind, random.randrange(40) if kind == "abort" else random.randint(1, 4)))
    return actions


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("ahead", QUEUES)
def test_a_crowd_gets_the_right_tokens_under_memory_pressure(seed: int, ahead: str) -> None:
    random = Random(seed)
    max_num_seqs = random.randint(2, 6)
    budget = max_num_seqs + random.randint(1, 24)
    caching, guessing = random.random() < 0.7, random.choice([0, 2, 4])
    host = (random.choice([0, 2, 10, 40]), random.choice(["auto", "recompute", "swap", "swap"]), ahead)
    world = World(random.randint(8, 20), max_num_seqs, budget, caching, guessing, *host)
    check(world, crowd(random))


def check(world: World, actions: list[tuple]) -> None:  # type: ignore[type-arg]
    for action in actions:
        world.act(action)
    world.run_to_idle()
    assert set(world.reasons) == set(world.prompts)
    assert world.core.pool.num_used == 0
    assert not world.core._steps.num_in_flight
    assert not world.core.scheduler.blocks._promised
    assert world.core.pool.num_free == world.num_blocks
    assert all(adapter.num_waiting == adapter.num_running == 0 for adapter in world.adapters.stats())
    for name, (prompt, max_tokens, adapter) in world.prompts.items():
        poisoned = CRASH in prompt or NAN in prompt
        expected = [] if poisoned else greedy(prompt, max_tokens, f"weights of {adapter}" if adapter else "")
        if world.reasons[name] is FinishReason.LENGTH:
            assert world.tokens[name] == expected[: min(max_tokens, world.core.model.max_model_len - len(prompt))]
        else:
            assert world.tokens[name] == expected[: len(world.tokens[name])]
        assert not poisoned or world.reasons[name] is not FinishReason.LENGTH
