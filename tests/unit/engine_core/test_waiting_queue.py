"""The order in which waiting sequences start."""

from __future__ import annotations

from octavo_engine.scheduler.fairness import VirtualTokens
from octavo_engine.scheduler.waiting_queue import WaitingQueue
from scheduler_examples import sequence


def order(queue: WaitingQueue, now: float = 0.0) -> list[str]:
    names = []
    while (seq := queue.pop()) is not None:
        queue.admitted(seq, now)
        names.append(seq.request_id)
    return names


def queue(**settings: float) -> WaitingQueue:
    return WaitingQueue(VirtualTokens(), **settings)  # type: ignore[arg-type]


def test_better_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    waiting = queue()
    for name, arrival, priority in (("c", 0.0, 1), ("b", 2.0, 0), ("a", 1.0, 0), ("d", 3.0, -1)):
        waiting.push(sequence(name, arrival, priority=priority))
    assert order(waiting) == ["d", "a", "b", "c"]


def test_the_earliest_deadline_of_a_tenant_goes_first() -> None:
    waiting = queue()
    for name, deadline in (("none", None), ("late", 30.0), ("soon", 5.0)):
        waiting.push(sequence(name, deadline_s=deadline))
    assert order(waiting) == ["soon", "late", "none"]


def test_a_preempted_sequence_goes_before_new_ones_of_its_priority() -> None:
    waiting = queue()
    resumed = sequence("resumed", 5.0)
    resumed.num_preemptions = 1
    for seq in (sequence("new", 0.0), resumed, sequence("urgent", 9.0, priority=-1)):
        waiting.push(seq)
    assert order(waiting) == ["urgent", "resumed", "new"]


def test_a_worse_priority_gets_its_share_once_it_has_waited() -> None:
    waiting = queue(ageing_s=10.0, max_passes=3)
    waiting.push(sequence("patient", 0.0, priority=5))
    for i in range(12):
        waiting.push(sequence(f"urgent{i}", 1.0))
    assert order(waiting, now=5.0).index("patient") == 12
    waiting.push(sequence("patient", 0.0, priority=5))
    for i in range(12):
        waiting.push(sequence(f"urgent{i}", 1.0))
    assert order(waiting, now=20.0).index("patient") == 3


def test_the_turn_of_a_worse_priority_that_cannot_run_is_skipped() -> None:
    waiting = queue(ageing_s=0.0, max_passes=1)
    for name, priority in (("patient", 5), ("patient too", 5), ("urgent0", 0), ("urgent1", 0)):
        waiting.push(sequence(name, priority=priority))
    first = waiting.pop()
    assert first is not None
    waiting.admitted(first, now=1.0)
    turn = waiting.pop()
    following = waiting.pop(best_band=True)
    assert turn is not None
    assert following is not None
    assert [first.request_id, turn.request_id, following.request_id] == ["urgent0", "patient", "urgent1"]


def test_removed_sequences_are_skipped_and_not_counted() -> None:
    waiting = queue()
    seqs = [sequence(f"r{i}", float(i)) for i in range(5)]
    for seq in seqs:
        waiting.push(seq)
    waiting.remove(seqs[0])
    waiting.remove(seqs[3])
    assert (len(waiting), waiting.num_tokens) == (3, 12)
    assert order(waiting) == ["r1", "r2", "r4"]


def test_requests_that_come_and_go_behind_others_leave_no_trace() -> None:
    waiting = queue(ageing_s=0.0, max_passes=2)
    waiting.push(sequence("first", 0.0))
    waiting.push(sequence("second", 1.0, priority=1))
    for i in range(5_000):
        seq = sequence(f"r{i}", 2.0, priority=i % 3)
        waiting.push(seq)
        waiting.remove(seq)
    assert sum(len(band._arrivals) for band in waiting._bands.values()) < 600
    assert order(waiting) == ["first", "second"]


def test_pushing_a_blocked_head_again_and_again_keeps_the_queue_small() -> None:
    waiting = queue()
    for i in range(3):
        waiting.push(sequence(f"r{i}", float(i)))
    for _ in range(100):
        blocked = [waiting.pop() for _ in range(3)]
        for seq in blocked:
            assert seq is not None
            waiting.push(seq)
    assert order(waiting) == ["r0", "r1", "r2"]
