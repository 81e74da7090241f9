"""Chained prompt hashes and the bounded index of what each replica has cached."""

from __future__ import annotations

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


def test_a_wrong_expectation_is_unlearned_from_its_tail() -> None:
    index = PrefixIndex()
    index.record("r", (1, 2, 3, 4))
    index.correct("r", (1, 2, 3, 4), cached_fraction=0.5)

    assert index.matched("r", (1, 2, 3, 4)) == 2


def test_eviction_never_orphans_the_start_of_a_chain() -> None:
    index = PrefixIndex(max_blocks=4)
    index.record("r", (1, 2, 3))
    index.record("r", (7, 8, 9))

    assert index.matched("r", (7, 8, 9)) == 3
    assert index.matched("r", (1, 2, 3)) == 1


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
