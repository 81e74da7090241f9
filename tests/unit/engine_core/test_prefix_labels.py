"""Labels of prefixes: what a router that never saw the tokens is told is what the engine's tiers hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_runner import FakeRunner
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.kv.events import KVEventBatch
from octavo_engine.kv.hashing import extend_keys, root_key
from octavo_engine.kv.prefix_labels import LABELS_PER_BLOCK, PrefixLabels, PrefixUpdate
from octavo_engine.messages import AddRequest
from octavo_engine.sampling_params import SamplingParams

BLOCK = 4


def engine(num_blocks: int = 16, num_host_blocks: int = 0, **options: object) -> EngineCore:
    config = EngineConfig(
        model="fake", max_num_seqs=4, max_num_batched_tokens=64, kv_events_endpoint="tcp://*:0", **options  # type: ignore[arg-type]
    )  # fmt: skip
    core = EngineCore(FakeRunner(num_blocks=num_blocks, num_host_blocks=num_host_blocks), config, lambda: 0.0)
    assert core.pool.block_size == BLOCK
    if core.scheduler.blocks.host is not None:
        core.scheduler.blocks.host.return_rate = 1.0
    return core


def ask(core: EngineCore, name: str, prompt: list[int], labels: list[tuple[int, int]]) -> None:
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    core.add(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, prefix_labels=labels))


def drain(core: EngineCore) -> list[KVEventBatch]:
    batches = []
    for _ in range(1_000):
        if not core.has_work:
            return batches
        core.step()
        batch = core.take_kv_events()
        if batch is not None:
            batches.append(batch)
    raise AssertionError("the engine did not become idle")


def believe(known: set[int], update: PrefixUpdate | None) -> set[int]:
    """What a router knows after an update."""
    if update is None:
        return known
    return (set() if update.cleared else known) - set(update.removed) | set(update.stored)


def test_labels_are_told_when_their_blocks_can_be_found() -> None:
    core = engine()
    ask(core, "a", list(range(1, 14)), [(4, 101), (8, 102), (13, 103)])
    known: set[int] = set()
    for batch in drain(core):
        known = believe(known, batch.prefix)
    assert known == {101, 102, 103}
    assert core.kv_snapshot().prefix == PrefixUpdate(
        engine=core.kv_snapshot().prefix.engine, cleared=True, stored=[101, 102, 103]  # type: ignore[union-attr]
    )  # fmt: skip


def test_a_prefix_that_another_request_computed_gets_the_labels_of_whoever_finds_it() -> None:
    core = engine()
    prompt = list(range(1, 14))
    ask(core, "a", prompt, [])
    assert all(batch.prefix is None for batch in drain(core))
    ask(core, "b", prompt, [(4, 101), (12, 103)])
    (told,) = [batch.prefix for batch in drain(core) if batch.prefix is not None]
    assert told.stored == [101, 103]


def test_evicted_labels_are_told_as_removed_and_a_reset_clears_all() -> None:
    core = engine(num_blocks=6)
    ask(core, "a", list(range(1, 17)), [(8, 1), (16, 2)])
    known: set[int] = set()
    for batch in drain(core):
        known = believe(known, batch.prefix)
    assert known == {1, 2}
    ask(core, "b", list(range(50, 66)), [(8, 3), (16, 4)])
    for batch in drain(core):
        known = believe(known, batch.prefix)
    assert {3, 4} <= known
    assert 2 not in known, "the end of a prefix goes first"
    core.reset_prefix_cache()
    batch = core.take_kv_events()
    assert batch is not None
    assert believe(known, batch.prefix) == set()


@pytest.mark.parametrize("num_host_blocks", [0, 12])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_what_is_told_is_what_the_tiers_hold(num_host_blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    core = engine(num_blocks=10, num_host_blocks=num_host_blocks)
    heads = [[rng.randrange(1, 60) for _ in range(20)] for _ in range(4)]
    known: set[int] = set()
    for number in range(25):
        head = rng.randrange(4)
        prompt = heads[head][: rng.randrange(5, 20)]
        ask(core, f"r{number}", prompt, [(end, head * 100 + end) for end in range(BLOCK, len(prompt) + 1, BLOCK)])
        if rng.random() < 0.6:
            for batch in drain(core):
                known = believe(known, batch.prefix)
        if rng.random() < 0.05:
            core.reset_prefix_cache()
        batch = core.take_kv_events()
        known = believe(known, batch.prefix if batch else None)
        snapshot = core.kv_snapshot().prefix
        assert snapshot is not None
        assert known == set(snapshot.stored)
    for batch in drain(core):
        known = believe(known, batch.prefix)
    held = _held(core, heads)
    assert known <= held
    if not num_host_blocks:
        assert known == held


def _held(core: EngineCore, heads: list[list[int]]) -> set[int]:
    """Labels of the blocks that some tier holds, found by their content."""
    host = core.scheduler.blocks.host
    labels = set()
    for head, tokens in enumerate(heads):
        keys: list[bytes] = []
        extend_keys(keys, root_key(), tokens, len(tokens) // BLOCK, BLOCK)
        for number, key in enumerate(keys, start=1):
            if core.pool.match([key]) or (host is not None and host.pool.match([key])):
                labels.add(head * 100 + number * BLOCK)
    return labels


def test_one_block_keeps_only_its_newest_labels() -> None:
    labels = PrefixLabels("e")
    for label in range(LABELS_PER_BLOCK + 3):
        labels.attach(b"block", label, {"GPU"})
    assert len(labels) == LABELS_PER_BLOCK
    assert labels.snapshot().stored == list(range(3, LABELS_PER_BLOCK + 3))


def test_events_can_leave_out_what_was_said() -> None:
    core = engine(kv_events_token_ids=False)
    ask(core, "a", list(range(1, 14)), [(8, 7)])
    stored = [event for batch in drain(core) for event in batch.events]
    assert stored
    assert all(not getattr(event, "token_ids", None) for event in stored)
