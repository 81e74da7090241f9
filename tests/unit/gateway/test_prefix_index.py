"""Chained prompt hashes and the bounded index of what each replica has cached."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.routing import PrefixIndex, chain_hashes
from octavo_gateway.routing.prefix_index import BLOCK_BYTES, MAX_BLOCKS


def test_prompts_share_as_many_hashes_as_whole_leading_blocks() -> None:
    common = b"x" * (3 * BLOCK_BYTES)
    one, two = chain_hashes(common + b"a" * BLOCK_BYTES, b"s"), chain_hashes(common + b"b" * BLOCK_BYTES, b"s")

    assert one[:3] == two[:3]
    assert one[3] != two[3]


def test_equal_text_under_different_seeds_shares_nothing() -> None:
    text = b"secret" * 200

    assert not set(chain_hashes(text, b"tenant-a")) & set(chain_hashes(text, b"tenant-b"))


def test_a_block_depends_on_everything_before_it() -> None:
    tail = b"t" * BLOCK_BYTES

    assert chain_hashes(b"a" * BLOCK_BYTES + tail, b"")[1] != chain_hashes(b"b" * BLOCK_BYTES + tail, b"")[1]


def test_huge_prompts_cost_a_bounded_number_of_hashes() -> None:
    assert len(chain_hashes(b"x" * 10_000_000, b"")) == MAX_BLOCKS
    assert chain_hashes(b"short", b"") == ()


def test_a_recorded_prefix_matches_up_to_the_first_unknown_block() -> None:
    index = PrefixIndex()
    index.record("r", (1, 2, 3))

    assert index.matched("r", (1, 2, 9, 3)) == 2
    assert index.matched("r", (9, 1, 2)) == 0
    assert index.matched("other", (1,)) == 0


def false_beliefs(learn: bool) -> float:
    """Share of wrong beliefs when the index could hold 10,000 blocks and the engine keeps 200 of 1,000 in use."""
    index, keeps, rng = PrefixIndex(max_blocks=10_000), 200, random.Random(4)
    engine: list[int] = []
    believed = wrong = 0
    for turn in range(1_500):
        start = rng.randrange(100) * 10
        prefix = tuple(range(start, start + 10))
        expected = index.matched("r", prefix)
        cached = sum(1 for block in prefix if block in engine[-keeps:])
        if learn:
            index.observe("r", expected, len(prefix), cached / len(prefix))
        if turn >= 500 and expected:
            believed += 1
            wrong += cached < expected / 2
        index.record("r", prefix)
        engine = [block for block in engine[-keeps:] if block not in prefix] + list(prefix)
    return wrong / believed


def test_the_index_learns_how_much_an_engine_really_keeps() -> None:
    assert false_beliefs(learn=False) > 0.7
    assert false_beliefs(learn=True) < 0.3


def test_an_engine_is_believed_to_keep_what_it_says_until_it_is_seen_to_keep_more() -> None:
    index = PrefixIndex(max_blocks=10_000)
    index.expect("r", 100)
    index.expect("r", 5_000)  # told again with every report; what was learned stays
    for start in range(0, 1_000, 10):
        index.record("r", tuple(range(start, start + 10)))
    told = len(index)
    for _ in range(200):
        index.observe("r", 10, 10, 1.0)
    for start in range(0, 1_000, 10):
        index.record("r", tuple(range(start, start + 10)))
    learned = len(index)
    index.retain(set())

    assert (told, learned) == (100, 300)
    assert index._learned == {}


def test_a_belief_that_held_lets_the_share_grow_back() -> None:
    index = PrefixIndex(max_blocks=10_000)
    for start in range(0, 1_000, 10):
        index.record("r", tuple(range(start, start + 10)))
    index.observe("r", 10, 10, 0.0)
    shrunk = len(index)
    for _ in range(500):
        index.observe("r", 10, 10, 1.0)
    for start in range(0, 1_000, 10):
        index.record("r", tuple(range(start, start + 10)))

    assert shrunk == 900
    assert len(index) == 1_000


def test_eviction_never_orphans_the_start_of_a_chain() -> None:
    index = PrefixIndex(max_blocks=4)
    index.record("r", (1, 2, 3))
    index.record("r", (7, 8, 9))

    assert index.matched("r", (7, 8, 9)) == 3
    assert index.matched("r", (1, 2, 3)) == 1


@pytest.mark.slow
def test_ten_million_blocks_leave_a_quarter_gibibyte_at_most() -> None:
    def resident_mib() -> float:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    index, before = PrefixIndex(), resident_mib()
    for number in range(40_000):
        index.record(f"r{number % 8}", [number << 20 | block for block in range(250)])

    assert len(index) == index.max_blocks
    assert resident_mib() - before <= 256


def test_endpoints_that_are_gone_leave_nothing_behind() -> None:
    index = PrefixIndex()
    index.record("a", (1, 2))
    index.record("b", (1, 2))
    index.retain({"b"})
    assert len(index) == 2

    index.forget("b")
    assert len(index) == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.integers(), max_size=12)), max_size=60), st.integers(4, 64)
)
def test_memory_stays_below_the_bound(records: list[tuple[str, list[int]]], bound: int) -> None:
    index = PrefixIndex(max_blocks=bound)
    for endpoint, blocks in records:
        index.record(endpoint, blocks)
        assert len(index) <= bound


def test_an_endpoint_that_tells_is_believed_and_what_was_sent_counts_until_the_request_ends() -> None:
    index = PrefixIndex()
    index.record("r", (1, 2, 3))
    index.follow("r")
    assert index.matched("r", (1, 2, 3)) == 0, "what was guessed is over"
    index.stored("r", (1, 2))
    index.record("r", (1, 2, 3, 4))
    assert index.matched("r", (1, 2, 3, 4)) == 4
    index.stored("r", (3,))
    index.ended("r", (1, 2, 3, 4))
    assert index.matched("r", (1, 2, 3, 4)) == 3, "the engine did not keep the last block"
    index.removed("r", (2,))
    assert index.matched("r", (1, 2, 3)) == 1


def test_counts_of_cached_tokens_teach_nothing_about_an_endpoint_that_tells() -> None:
    index = PrefixIndex()
    index.expect("r", 64)
    index.follow("r")
    index.stored("r", range(1_000))
    for _ in range(100):
        index.observe("r", 100, 100, 0.0)
    assert index.matched("r", range(1_000)) == 1_000


def test_an_endpoint_that_falls_silent_is_guessed_at_again() -> None:
    index = PrefixIndex()
    index.follow("r")
    index.stored("r", (1, 2))
    index.unfollow("r")
    assert index.matched("r", (1, 2)) == 2
    index.removed("r", (1,))
    index.stored("r", (3,))
    assert index.matched("r", (1, 2, 3)) == 2, "a feed that was given up changes nothing any more"
    index.record("r", (1, 2, 3))
    assert index.matched("r", (1, 2, 3)) == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=300))
def test_endpoints_that_tell_stay_within_the_bound_too(told: list[tuple[str, int]]) -> None:
    index = PrefixIndex(max_blocks=30)
    for endpoint in "abc":
        index.follow(endpoint)
    for endpoint, block in told:
        index.stored(endpoint, (block, block + 1))
    assert len(index) <= 30
