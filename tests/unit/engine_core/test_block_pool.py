"""Reference counts, eviction order and content keys of KV blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.kv.block_manager import BlockManager, BlockTable
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.free_list import FreeList
from octavo_engine.kv.hashing import extend_keys, root_key


def keys_of(tokens: list[int], block_size: int = 4, salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key(salt), tokens, len(tokens) // block_size, block_size)
    return keys


def test_equal_prefixes_have_equal_keys_up_to_the_first_difference() -> None:
    a, b = keys_of([1, 2, 3, 4, 5, 6, 7, 8]), keys_of([1, 2, 3, 4, 5, 6, 7, 9])
    assert a[0] == b[0]
    assert a[1] != b[1]


def test_the_same_block_after_another_prefix_has_another_key() -> None:
    assert keys_of([1, 2, 3, 4, 5, 6, 7, 8])[1] != keys_of([9, 2, 3, 4, 5, 6, 7, 8])[1]


def test_salts_and_extra_parts_change_every_key() -> None:
    assert keys_of([1, 2, 3, 4], salt="a") != keys_of([1, 2, 3, 4], salt="b")
    assert root_key("a", ("b",)) != root_key("ab") != root_key("", ("ab",))


@given(st.lists(st.integers(0, 200_000), max_size=40), st.integers(1, 7))
def test_keys_do_not_depend_on_how_they_were_extended(tokens: list[int], block_size: int) -> None:
    total = len(tokens) // block_size
    stepwise: list[bytes] = []
    for count in range(total + 1):
        extend_keys(stepwise, root_key(), tokens, count, block_size)
    assert stepwise == keys_of(tokens, block_size)


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    pool = BlockPool(3, 4)
    a, b, c = pool.allocate(3)
    pool.publish(a, b"a")
    pool.release([a, b, c])
    assert set(pool.allocate(2)) == {b, c}
    assert pool.match([b"a"]) == [a]


def test_cached_blocks_are_evicted_oldest_first_and_prefix_last() -> None:
    pool = BlockPool(4, 4)
    old = pool.allocate(2)
    new = pool.allocate(2)
    for index, block in enumerate(old + new):
        pool.publish(block, bytes([index]))
    pool.release(old)
    pool.release(new)
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]
    assert pool.num_cached == 0


def test_an_acquired_block_is_not_evicted() -> None:
    pool = BlockPool(2, 4)
    a, b = pool.allocate(2)
    pool.publish(a, b"a")
    pool.release([a, b])
    pool.acquire(pool.match([b"a"]))
    assert pool.allocate(1) == [b]
    assert pool.num_free == 0


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(1, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often"):
        pool.release(blocks)


def test_the_first_block_with_a_content_stays_the_one_found() -> None:
    pool = BlockPool(2, 4)
    a, b = pool.allocate(2)
    pool.publish(a, b"k")
    pool.publish(b, b"k")
    assert pool.match([b"k"]) == [a]
    pool.release([a, b])
    assert pool.allocate(1) == [b]


def test_growing_needs_free_blocks_and_changes_nothing_without_them() -> None:
    manager = BlockManager(BlockPool(2, 4))
    table = BlockTable(root_key())
    manager.allocate(table, [], 8)
    assert not manager.grow(table, 9)
    assert (table.capacity, len(table.blocks)) == (8, 2)


def test_a_hit_always_leaves_a_token_to_compute() -> None:
    manager = BlockManager(BlockPool(8, 4))
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    first, second = BlockTable(root_key()), BlockTable(root_key())
    manager.allocate(first, [], 8)
    manager.publish(first, tokens, 8)
    assert manager.match_prefix(second, tokens) == first.blocks[:1]
    assert manager.match_prefix(second, [*tokens, 9]) == first.blocks


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["front", "back", "pop", "remove"]), st.integers(0, 7)), max_size=60))
def test_the_free_list_behaves_like_a_list(actions: list[tuple[str, int]]) -> None:
    free, model = FreeList(8), list(range(8))
    for action, block in actions:
        if action == "pop" and model:
            assert free.pop_front() == model.pop(0)
        elif action == "remove" and block in model:
            free.remove(block)
            model.remove(block)
        elif action == "front" and block not in model:
            free.push_front(block)
            model.insert(0, block)
        elif action == "back" and block not in model:
            free.push_back(block)
            model.append(block)
        assert len(free) == len(model)
    assert [free.pop_front() for _ in range(len(model))] == model
