"""Scaling to zero and back in virtual time: whatever the interleaving, no request is lost and no start is cut short."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from octavo_operator.autoscale.decide import decide
from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.policy import Pace, PaceLimit, ScalingPolicy
from octavo_operator.autoscale.signals import ReplicaSample, Signals

INTERVAL_S = 5
PROPAGATION_S = 5  # a leaving replica still takes requests this long
SLOTS = 4


@dataclass
class Replica:
    """A pod: `ready_at` in seconds; `running` holds the times at which its requests end."""

    name: str
    ready_at: int
    running: list[int] = field(default_factory=list)
    leaving_at: int | None = None
    sample: ReplicaSample | None = None

    def ready(self, now: int) -> bool:
        return now >= self.ready_at

    def takes(self, now: int) -> bool:
        return self.ready(now) and (self.leaving_at is None or now < self.leaving_at + PROPAGATION_S)


class World:
    """One service with a gateway in front. Chance decides arrivals, start-up times, lost scrapes and late views."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.policy = ScalingPolicy(
            min_replicas=0,
            max_replicas=3,
            idle_s=self.dice.choice([10.0, 20.0, 45.0]),
            max_num_seqs=SLOTS,
            down=Pace(self.dice.choice([0.0, 15.0]), (PaceLimit(False, 1, 15.0),)),
        )
        self.history = History(started_at=-300.0)
        self.now = 0
        self.wanted = self.made = 0
        self.replicas: list[Replica] = []
        self.held: list[int] = []  # how long each held request will run
        self.arrivals = self.finished = 0
        self.seen: list[tuple[list[Replica], int]] = []  # what the gateway knew, and what it had counted, by second
        self.longest_hold_s = self._hold_s = 0

    def run(self, arrivals: dict[int, list[int]]) -> None:
        """Play arrivals (second to run times) until all are answered and nothing runs any more."""
        while self.now <= max(arrivals) or self.held or self.replicas:
            assert self.now < max(arrivals) + 3_000, f"{len(self.held)} held, {self.wanted} wanted for ever"
            came = arrivals.get(self.now, [])
            self.arrivals += len(came)
            self.held += came
            self._serve()
            if self.now % INTERVAL_S == 0:
                self._scale()
            self._hold_s = self._hold_s + 1 if self.held else 0
            self.longest_hold_s = max(self.longest_hold_s, self._hold_s)
            self.now += 1

    def _serve(self) -> None:
        for replica in self.replicas:
            self.finished += sum(end <= self.now for end in replica.running)
            replica.running = [end for end in replica.running if end > self.now]
        self.replicas = [r for r in self.replicas if r.takes(self.now) or r.running or r.leaving_at is None]
        self.seen.append(([r for r in self.replicas if r.ready(self.now) and r.leaving_at is None], self.arrivals))
        known, _ = self.seen[max(0, len(self.seen) - 1 - self.dice.randrange(3))]  # its watch may be late
        for replica in known:
            while self.held and replica.takes(self.now) and len(replica.running) < SLOTS:
                replica.running.append(self.now + self.held.pop(0))

    def _signals(self) -> Signals:
        live = [r for r in self.replicas if r.leaving_at is None]
        ready = [r for r in live if r.ready(self.now)]
        for replica in ready:
            if replica.sample is None or self.dice.random() > 0.1:  # else the scrape is lost and the last sample stays
                busy = len(replica.running)
                replica.sample = ReplicaSample(
                    replica.name, float(self.now), running=busy, kv_utilization=busy / SLOTS / 2
                )
        return Signals(
            current=self.wanted,
            ready=len(ready),
            samples=tuple(r.sample for r in ready if r.sample is not None),
            pending=len(live) - len(ready),
            held=len(self.held),
            arrivals=float(self.arrivals),
        )

    def _scale(self) -> None:
        signals = self._signals()
        decision = decide(signals, self.policy, self.history, float(self.now))
        self.history = decision.history
        live = [r for r in self.replicas if r.leaving_at is None]
        if signals.pending:
            assert decision.replicas >= self.wanted, "a replica that starts is never taken away"
        for _ in range(decision.replicas - len(live)):
            self.made += 1
            node_s = self.dice.choice([0, 0, 0, 600])  # a node may first have to be bought
            self.replicas.append(Replica(f"r{self.made}", self.now + node_s + self.dice.randrange(2, 60)))
        by_work = sorted(live, key=lambda r: (r.ready(self.now), len(r.running)))
        for replica in by_work[: max(0, len(live) - decision.replicas)]:
            replica.leaving_at = self.now
        self.wanted = decision.replicas


def trace(seed: int) -> dict[int, list[int]]:
    """Small bursts whose distances are near the time after which an idle service is given back."""
    dice = random.Random(seed * 31 + 7)
    arrivals: dict[int, list[int]] = {}
    time = 0
    for _ in range(8):
        time += dice.choice([1, 9, 10, 11, 19, 21, 44, 46, 60, 100])
        arrivals[time] = [dice.randrange(1, 30) for _ in range(dice.randrange(1, 6))]
    return arrivals


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 10))])
def test_a_thousand_interleavings_of_arrivals_and_sleep_lose_no_request(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        world, arrivals = World(seed), trace(seed)
        world.run(arrivals)
        assert world.finished == world.arrivals == sum(map(len, arrivals.values())), f"seed {seed}"
        assert (world.made > 0, world.wanted) == (True, 0), f"seed {seed}"


def test_a_replica_whose_node_comes_after_ten_minutes_still_answers() -> None:
    world = World(1)
    world.replicas.append(Replica("slow", 660))
    world.wanted = 1
    world.run({0: [5]})
    assert world.finished == 1
    assert world.made == 0, "waiting for a node is no reason for another replica"
    assert world.longest_hold_s >= 600
