"""Reference counts, eviction order and content keys of KV blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.kv.block_manager import BlockManager, BlockTable, PrefixMatch
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventLog
from octavo_engine.kv.eviction import EvictionQueue
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
    manager.allocate(table, PrefixMatch([]), [0] * 8)
    assert not manager.grow(table, 9)
    assert (table.capacity, len(table.blocks)) == (8, 2)


def test_a_hit_always_leaves_a_token_to_compute() -> None:
    manager = BlockManager(BlockPool(8, 4))
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    first, second = BlockTable(root_key()), BlockTable(root_key())
    manager.allocate(first, PrefixMatch([]), tokens)
    manager.publish(first, tokens, 8)
    assert manager.match_prefix(second, tokens) == PrefixMatch(first.blocks[:1], [], 4)
    assert manager.match_prefix(second, [*tokens, 9]) == PrefixMatch(first.blocks, [], 8)


def cached(queue: EvictionQueue, blocks: list[int], num_hits: int = 0, tenant: str = "") -> None:
    for block in blocks:
        queue.add_cached(block, num_hits, tenant)


def take_all(queue: EvictionQueue) -> list[int]:
    return [queue.pop() for _ in range(len(queue))]


def empty_queue(num_blocks: int, quota: int | None = None) -> EvictionQueue:
    queue = EvictionQueue(num_blocks, quota)
    take_all(queue)
    return queue


def test_a_prefix_in_use_outlives_many_prompts_seen_once() -> None:
    queue = empty_queue(100)
    cached(queue, [0], num_hits=5)
    cached(queue, list(range(1, 50)))
    assert take_all(queue)[-1] == 0


def test_a_prefix_that_nobody_uses_any_more_goes_in_the_end() -> None:
    queue = empty_queue(4)
    cached(queue, [0], num_hits=20)
    evicted = []
    for step in range(200):
        cached(queue, [1 + step % 2])
        evicted.append(queue.pop())
    assert 0 in evicted


def test_a_tenant_over_its_share_is_evicted_first_and_only_when_memory_is_needed() -> None:
    queue = empty_queue(20, quota=4)
    cached(queue, [0, 1, 2], tenant="small")
    cached(queue, list(range(3, 13)), num_hits=3, tenant="big")
    assert len(queue) == 13
    assert [queue.pop() for _ in range(6)] == [3, 4, 5, 6, 7, 8]
    assert queue.pop() == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["cached", "unused", "pop", "remove"]), st.integers(0, 7), st.integers(0, 40)),
        max_size=80,
    ),
    st.one_of(st.none(), st.integers(0, 4)),
)
def test_no_free_block_is_lost_or_given_twice(actions: list[tuple[str, int, int]], quota: int | None) -> None:
    queue = EvictionQueue(8, quota)
    free, with_content = set(range(8)), set()
    for action, block, hits in actions:
        if action == "pop" and free:
            taken = queue.pop()
            assert taken in free
            assert with_content.isdisjoint({taken}) or with_content == free
            free.discard(taken)
            with_content.discard(taken)
        elif action == "remove" and block in with_content:
            queue.remove(block)
            free.discard(block)
            with_content.discard(block)
        elif action == "cached" and block not in free:
            queue.add_cached(block, hits, f"tenant{block % 2}")
            free.add(block)
            with_content.add(block)
        elif action == "unused" and block not in free:
            queue.add_unused(block)
            free.add(block)
        assert len(queue) == len(free)
    assert sorted(take_all(queue)) == sorted(free)


def test_events_tell_the_whole_story_of_the_cache() -> None:
    log = KVEventLog(4)
    manager = BlockManager(BlockPool(3, 4, events=log))
    tokens = list(range(1, 13))
    table = BlockTable(root_key())
    manager.allocate(table, PrefixMatch([]), [0] * 12)
    manager.publish(table, tokens, 8)
    manager.publish(table, tokens, 12)
    manager.free(table)
    manager.allocate(BlockTable(root_key()), PrefixMatch([]), [0] * 8)
    manager.pool.reset_cache()
    batch = log.take()
    assert batch is not None
    first, second, removed, cleared = batch.events
    assert isinstance(first, BlockStored)
    assert (first.block_hashes, first.parent_block_hash, first.token_ids) == (table.keys[:2], None, tokens[:8])
    assert isinstance(second, BlockStored)
    assert (second.block_hashes, second.parent_block_hash) == (table.keys[2:], table.keys[1])
    assert removed == BlockRemoved(block_hashes=[table.keys[2], table.keys[1]])
    assert cleared == AllBlocksCleared()
    assert log.take() is None


def test_blocks_that_are_forgotten_are_reused_first() -> None:
    pool = BlockPool(3, 4)
    a, b, c = pool.allocate(3)
    for block in (a, b, c):
        pool.publish(block, bytes([block]))
    pool.release([a, b, c])
    pool.unpublish([b])
    assert pool.allocate(1) == [b]
    assert pool.num_cached == 2
