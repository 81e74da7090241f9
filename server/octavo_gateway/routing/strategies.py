"""The strategies of `spec.routing.strategy`, and the router that keeps one of each."""

from __future__ import annotations

import random
from collections.abc import Sequence

import xxhash

from octavo_gateway.registry import Strategy
from octavo_gateway.routing.policy import Candidate, Choice, Policy, RouteRequest
from octavo_gateway.routing.prefix_index import PrefixIndex


def _by_load(candidate: Candidate) -> tuple[float, int]:
    """Order by load; among equals the one chosen longest ago."""
    return candidate.score, candidate.load.last_chosen


class RoundRobin:
    """The endpoint chosen longest ago."""

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        best = min(candidates, key=lambda c: c.load.last_chosen)
        return Choice(best.endpoint, "round robin")


class LeastLoaded:
    """The smallest load: waiting + running + KV use, with the gateway's own in-flight count exact."""

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        best = min(candidates, key=_by_load)
        return Choice(best.endpoint, f"least loaded {best.score:.2f} of {len(candidates)}")


class PowerOfTwo:
    """The less loaded of two drawn at random: nearly as good as least-loaded, and free of herds when several
    gateways see the same stale reports (Mitzenmacher 2001)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        drawn = candidates if len(candidates) <= 2 else self._rng.sample(candidates, 2)
        best = min(drawn, key=_by_load)
        return Choice(best.endpoint, f"less loaded {best.score:.2f} of two drawn from {len(candidates)}")


class PrefixAware:
    """The replica that has most of the prompt cached, unless it is busier than `load_factor` times the mean.

    The bound is that of consistent hashing with bounded loads (Mirrokni et al. 2016), applied per request, so one hot
    replica loses affinity without costing the others theirs. A new prefix goes to the least loaded; among idle
    ones rendezvous hashing on its first block decides, so several gateways agree without talking.
    """

    def __init__(self, index: PrefixIndex, load_factor: float = 1.25, load_weight: float = 0.25) -> None:
        self.index = index
        self._load_factor = load_factor
        self._load_weight = load_weight

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        if not request.prefix:
            idlest = min(candidates, key=_by_load)
            return Choice(idlest.endpoint, f"least loaded {idlest.score:.2f}: prompt shorter than one block")
        scores = [c.score for c in candidates]
        mean = sum(scores) / len(scores)
        bound = self._load_factor * (mean + 1.0)
        best: Candidate | None = None
        best_value, best_matched, overloaded = 0.0, 0, 0
        for candidate, score in zip(candidates, scores, strict=True):
            matched = self.index.matched(candidate.endpoint.id, request.prefix)
            if matched == 0:
                continue
            if score > bound:
                overloaded += 1
                continue
            value = matched / len(request.prefix) - self._load_weight * (score - mean) / (mean + 1.0)
            if best is None or value > best_value:
                best, best_value, best_matched = candidate, value, matched
        if best is not None:
            share = best_matched / len(request.prefix)
            return Choice(
                best.endpoint, f"prefix {share:.0%} cached, load {best.score:.2f} <= {bound:.2f}", best_matched
            )
        why = f"cached on {overloaded} above the load bound {bound:.2f}" if overloaded else "prefix not cached anywhere"
        chosen = self._place(candidates, scores, request.prefix[0])
        return Choice(chosen.endpoint, f"least loaded {chosen.score:.2f}: {why}")

    def _place(self, candidates: Sequence[Candidate], scores: Sequence[float], first_block: int) -> Candidate:
        idle = [c for c, score in zip(candidates, scores, strict=True) if score == 0.0]
        if not idle:
            return min(candidates, key=_by_load)
        return max(idle, key=lambda c: xxhash.xxh3_64_intdigest(c.endpoint.id.encode(), seed=first_block))


class SessionAffinity:
    """Rendezvous hashing on the session id: sticky without state, and only 1/n of sessions move when n changes."""

    def __init__(self, fallback: Policy) -> None:
        self._fallback = fallback

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        if not request.session:
            choice = self._fallback.choose(candidates, request)
            return Choice(choice.endpoint, f"{choice.reason}: no session id sent", choice.matched_blocks)
        seed = xxhash.xxh3_64_intdigest(request.session.encode())
        best = max(candidates, key=lambda c: xxhash.xxh3_64_intdigest(c.endpoint.id.encode(), seed=seed))
        return Choice(best.endpoint, "session affinity")


class Router:
    """One of each strategy over one shared prefix index."""

    def __init__(self, index: PrefixIndex, rng: random.Random) -> None:
        self.index = index
        least_loaded = LeastLoaded()
        self._policies: dict[Strategy, Policy] = {
            Strategy.ROUND_ROBIN: RoundRobin(),
            Strategy.LEAST_LOADED: least_loaded,
            Strategy.POWER_OF_TWO: PowerOfTwo(rng),
            Strategy.PREFIX_AWARE: PrefixAware(index),
            Strategy.SESSION: SessionAffinity(least_loaded),
        }

    def choose(self, strategy: Strategy, candidates: Sequence[Candidate], request: RouteRequest) -> Choice:
        """Choose among candidates; raises ValueError when there are none."""
        if not candidates:
            raise ValueError("no candidate to choose from")
        if len(candidates) == 1:
            only = candidates[0]
            matched = self.index.matched(only.endpoint.id, request.prefix) if request.prefix else 0
            return Choice(only.endpoint, "only replica available", matched)
        return self._policies[strategy].choose(candidates, request)
