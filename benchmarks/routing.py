"""Routing strategies on a simulated fleet: prefix hit rate against an oracle, load skew, latency.

Replicas keep an LRU of prompt blocks, prefill one request at a time at a fixed rate and decode in a batch whose step
grows with its size. Arrivals are Poisson and open-loop; the same trace goes through every strategy. The strategies are
those of the gateway; CHWBL (consistent hashing with bounded loads over the first 100 characters, as KubeAI routes) is
implemented here as a peer. The oracle's hit rate is that of one infinite cache shared by all replicas.

    python benchmarks/routing.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import bisect
import enum
import heapq
import json
import platform
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from octavo_gateway.load import LoadBook, LoadReport
from octavo_gateway.registry import Endpoint, Strategy
from octavo_gateway.routing import Candidate, Choice, PrefixIndex, Router, RouteRequest

REPLICAS = 8
BLOCK_TOKENS = 64
CACHE_BLOCKS = 900  # per replica: 57,600 tokens
PREFILL_TOKENS_S = 10_000.0
STEP_S = 0.020
REPORT_EVERY_S = 1.0
WARM_UP = 0.2  # share of the trace that is not measured
RESTART_AT = 0.6  # share of the trace at which a gateway that is restarted forgets its index
MINUTE_S = 60.0


@dataclass(frozen=True)
class Request:
    """`blocks`: the prompt's chained block ids. `session`: the conversation it belongs to."""

    at: float
    blocks: tuple[int, ...]
    output_tokens: int
    session: str


@dataclass
class Replica:
    """A simulated engine."""

    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    prefill_free_at: float = 0.0
    decoding: int = 0
    waiting: int = 0
    served: int = 0
    busy_s: float = 0.0

    def lookup(self, blocks: Sequence[int]) -> int:
        """Leading blocks found."""
        for count, block in enumerate(blocks):
            if block not in self.cache:
                return count
        return len(blocks)

    def store(self, blocks: Sequence[int]) -> list[int]:
        """Compute and keep blocks; the least recently used leave and are returned."""
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        evicted = []
        while len(self.cache) > CACHE_BLOCKS:
            evicted.append(self.cache.popitem(last=False)[0])
        return evicted


# ---- traces


def shared_prefixes(rng: random.Random, count: int, rate: float) -> Iterator[Request]:
    """50 system prompts of 1,000 to 8,000 tokens, Zipf(1.0), each with a short question of its own."""
    prefixes = [_blocks(f"system-{i}", rng.randrange(16, 125)) for i in range(50)]
    weights = [1 / (rank + 1) for rank in range(50)]
    now = 0.0
    for number in range(count):
        now += rng.expovariate(rate)
        prefix = rng.choices(prefixes, weights)[0]
        yield Request(now, prefix + _blocks(f"q-{number}", rng.randrange(1, 6)), rng.randrange(50, 300), f"s{number}")


def conversations(rng: random.Random, count: int, rate: float) -> Iterator[Request]:
    """400 conversations at a time, each turn repeating all turns before it."""
    histories: dict[int, tuple[int, ...]] = {}
    fresh = 0
    now = 0.0
    for number in range(count):
        now += rng.expovariate(rate)
        slot = rng.randrange(400)
        history = histories.get(slot, ())
        if not history or rng.random() < 0.08 or len(history) > 120:
            fresh += 1
            history = _blocks(f"start-{fresh}", rng.randrange(4, 12))
        history = history + _blocks(f"turn-{number}", rng.randrange(2, 8))
        histories[slot] = history
        yield Request(now, history, rng.randrange(50, 300), f"slot{slot}")


def unique(rng: random.Random, count: int, rate: float) -> Iterator[Request]:
    """Nothing is shared: affinity can only do harm."""
    now = 0.0
    for number in range(count):
        now += rng.expovariate(rate)
        yield Request(now, _blocks(f"u-{number}", rng.randrange(8, 60)), rng.randrange(50, 300), f"s{number}")


def _blocks(name: str, count: int) -> tuple[int, ...]:
    state = xxhash.xxh3_64_intdigest(name.encode())
    return tuple(xxhash.xxh3_64_intdigest(str(i).encode(), seed=state) for i in range(count))


TRACES = {"shared prefixes": (shared_prefixes, 26.0), "conversations": (conversations, 30.0), "unique": (unique, 24.0)}


# ---- strategies


class Chwbl:
    """Consistent hashing with bounded loads: 256 virtual nodes, load at most 1.25 times the mean."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._ring = sorted(
            (xxhash.xxh3_64_intdigest(f"{e.id}-{v}".encode()), e.id) for e in endpoints for v in range(256)
        )
        self._points = [point for point, _ in self._ring]

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        by_id = {c.endpoint.id: c for c in candidates}
        bound = 1.25 * (sum(c.load.in_flight for c in candidates) + 1) / len(candidates)
        start = bisect.bisect(self._points, request.prefix[0] if request.prefix else 0)
        for step in range(len(self._ring)):
            candidate = by_id[self._ring[(start + step) % len(self._ring)][1]]
            if candidate.load.in_flight + 1 <= bound:
                return Choice(candidate.endpoint, "chwbl")
        return Choice(candidates[0].endpoint, "chwbl: all loaded")


STRATEGIES = {
    "round robin": Strategy.ROUND_ROBIN,
    "least loaded": Strategy.LEAST_LOADED,
    "power of two": Strategy.POWER_OF_TWO,
    "session": Strategy.SESSION,
    "CHWBL": None,
    "prefix aware": Strategy.PREFIX_AWARE,
}


@dataclass
class Result:
    """One trace through one strategy."""

    hit_rate: float
    oracle: float
    skew: float
    ttft_p50: float
    ttft_p99: float
    index_blocks: int
    before: float  # hit rate in the minute before RESTART_AT
    after: float  # and in the minute after it


class Learns(enum.Enum):
    """How the gateway knows what replicas have cached, besides what it sends them."""

    NOTHING = "nothing"
    COUNTS = "cached-token counts and cache sizes"
    EVENTS = "KV events, and a snapshot after a restart"


class Simulation:
    """Events in order: arrivals, ends of prefill, ends of requests, load reports."""

    def __init__(
        self, strategy: Strategy | None, seed: int, learns: Learns = Learns.COUNTS, restart: bool = False
    ) -> None:
        self.endpoints = [Endpoint(f"r{i}", f"http://r{i}:8000") for i in range(REPLICAS)]
        self.replicas = {e.id: Replica() for e in self.endpoints}
        self.loads = LoadBook()
        self.index = PrefixIndex(REPLICAS * 4 * CACHE_BLOCKS)  # believes in four times more than the engines keep
        self.router = Router(self.index, random.Random(seed))
        self.strategy = strategy
        self.chwbl = Chwbl(self.endpoints)
        self.learns = learns
        self._begin_to_learn()
        self.restart = restart
        self.events: list[tuple[float, int, str, object]] = []
        self.counter = 0

    def run(self, trace: Sequence[Request]) -> Result:
        """Play a trace."""
        ttfts: list[float] = []
        hits = total = oracle_hits = 0
        seen: set[int] = set()
        skews: list[float] = []
        served: list[tuple[float, int, int]] = []  # when, blocks found, blocks
        restart_at = trace[int(len(trace) * RESTART_AT)].at
        warm = int(len(trace) * WARM_UP)
        for request in trace:
            self._push(request.at, "arrive", request)
        self._push(0.0, "report", None)
        if self.restart:
            self._push(restart_at, "restart", None)
        arrived = 0
        while self.events:
            now, _, kind, data = heapq.heappop(self.events)
            if kind == "report":
                self._report(now)
                if arrived < len(trace):
                    self._push(now + REPORT_EVERY_S, "report", None)
                    if arrived > warm:
                        load = [self.loads[e.id].in_flight for e in self.endpoints]
                        if sum(load) >= REPLICAS:
                            skews.append(max(load) / (sum(load) / REPLICAS))
            elif kind == "restart":
                self.index.retain(set())
                self._begin_to_learn()
            elif kind == "arrive":
                assert isinstance(data, Request)
                arrived += 1
                found, ttft = self._serve(now, data)
                served.append((now, found, len(data.blocks)))
                if arrived > warm:
                    known = next((i for i, b in enumerate(data.blocks) if b not in seen), len(data.blocks))
                    oracle_hits += known
                    hits += found
                    total += len(data.blocks)
                    ttfts.append(ttft)
                seen.update(data.blocks)
            elif kind == "prefilled":
                replica, output_tokens, endpoint_id, pending = data  # type: ignore[misc]
                self.loads.answered(endpoint_id, pending)
                replica.waiting -= 1
                replica.decoding += 1
                duration = output_tokens * STEP_S * (1 + 0.02 * replica.decoding)
                self._push(now + duration, "end", (replica, endpoint_id))
            else:
                replica, endpoint_id = data  # type: ignore[misc]
                replica.decoding -= 1
                self.loads.end(endpoint_id)
        ttfts.sort()
        return Result(
            hit_rate=hits / total,
            oracle=oracle_hits / total,
            skew=statistics.mean(skews),
            ttft_p50=ttfts[len(ttfts) // 2],
            ttft_p99=ttfts[int(len(ttfts) * 0.99)],
            index_blocks=len(self.index),
            before=_hit_rate(served, restart_at - MINUTE_S, MINUTE_S),
            after=_hit_rate(served, restart_at, MINUTE_S),
        )

    def _serve(self, now: float, request: Request) -> tuple[int, float]:
        route = RouteRequest("m", request.blocks[:256], request.session)
        candidates = [Candidate(e, self.loads[e.id]) for e in self.endpoints]
        if self.strategy is None:
            choice = self.chwbl.choose(candidates, route)
        else:
            choice = self.router.choose(self.strategy, candidates, route)
        endpoint_id = choice.endpoint.id
        replica = self.replicas[endpoint_id]
        pending = (len(request.blocks) - choice.matched_blocks) * BLOCK_TOKENS
        self.loads.begin(endpoint_id, pending)
        self.index.record(endpoint_id, route.prefix)
        replica.served += 1
        found = replica.lookup(request.blocks)
        evicted = replica.store(request.blocks)
        if self.learns is Learns.COUNTS:
            self.index.observe(endpoint_id, choice.matched_blocks, len(request.blocks), found / len(request.blocks))
        elif self.learns is Learns.EVENTS:
            self.index.removed(endpoint_id, evicted)
            self.index.stored(endpoint_id, request.blocks)
        work = (len(request.blocks) - found) * BLOCK_TOKENS / PREFILL_TOKENS_S + STEP_S
        start = max(now, replica.prefill_free_at)
        replica.prefill_free_at = start + work
        replica.waiting += 1
        self._push(start + work, "prefilled", (replica, request.output_tokens, endpoint_id, pending))
        return found, start + work - now

    def _begin_to_learn(self) -> None:
        """What replicas tell a gateway that has just started: the size of their caches, or all that is in them."""
        for endpoint_id, replica in self.replicas.items():
            if self.learns is Learns.COUNTS:
                self.index.expect(endpoint_id, CACHE_BLOCKS)
            elif self.learns is Learns.EVENTS:
                self.index.follow(endpoint_id)
                self.index.stored(endpoint_id, list(replica.cache))

    def _report(self, now: float) -> None:
        for endpoint_id, replica in self.replicas.items():
            kv = min(1.0, (replica.decoding + replica.waiting) * 40 / CACHE_BLOCKS)
            self.loads[endpoint_id].update(LoadReport(max(0, replica.waiting - 1), replica.decoding + 1, kv, now))

    def _push(self, at: float, kind: str, data: object) -> None:
        self.counter += 1
        heapq.heappush(self.events, (at, self.counter, kind, data))


def _hit_rate(served: Sequence[tuple[float, int, int]], since: float, seconds: float) -> float:
    window = [(found, total) for at, found, total in served if since <= at < since + seconds]
    return sum(found for found, _ in window) / max(1, sum(total for _, total in window))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests, one seed")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    count, seeds = (1_500, [1]) if options.quick else (6_000, [1, 2, 3])
    rows = []
    print(f"{REPLICAS} replicas, {count} requests, seeds {seeds}; medians over seeds")
    for trace_name, (make, rate) in TRACES.items():
        print(f"\n{trace_name} at {rate:g} requests/s")
        print(f"{'strategy':26} {'hit rate':>9} {'of oracle':>9} {'max/mean':>9} {'TTFT p50':>9} {'TTFT p99':>9}")
        undisturbed: dict[Learns, float] = {}
        for name, strategy, learns, restart in [
            *((n, s, Learns.COUNTS, False) for n, s in STRATEGIES.items()),
            ("prefix aware, no learning", Strategy.PREFIX_AWARE, Learns.NOTHING, False),
            ("prefix aware, KV events", Strategy.PREFIX_AWARE, Learns.EVENTS, False),
            ("prefix aware, restarted", Strategy.PREFIX_AWARE, Learns.COUNTS, True),
            ("KV events, restarted", Strategy.PREFIX_AWARE, Learns.EVENTS, True),
        ]:
            results = [
                Simulation(strategy, s, learns, restart).run(list(make(random.Random(s), count, rate))) for s in seeds
            ]
            row = {
                key: statistics.median(getattr(r, key) for r in results)
                for key in ("hit_rate", "oracle", "skew", "ttft_p50", "ttft_p99", "index_blocks", "before", "after")
            }
            share = row["hit_rate"] / row["oracle"] if row["oracle"] else 1.0
            print(
                f"{name:26} {row['hit_rate']:9.1%} {share:9.1%} {row['skew']:9.2f} "
                f"{row['ttft_p50'] * 1e3:7.0f}ms {row['ttft_p99'] * 1e3:7.0f}ms"
            )
            if not restart:
                undisturbed[learns] = row["after"]
            elif row["oracle"]:
                before, same = row["after"] / row["before"], row["after"] / undisturbed[learns]
                print(
                    f"{'':26} the minute after hits {before:.0%} of the minute before, {same:.0%} of itself undisturbed"
                )
            rows.append({"trace": trace_name, "strategy": name} | row)
    if options.json:
        document = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
