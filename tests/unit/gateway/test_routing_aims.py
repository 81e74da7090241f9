"""The aims of prefix-aware routing, on the simulated fleet of `benchmarks/routing.py` with a fixed seed."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from octavo_gateway.registry import Strategy

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "routing.py"


@pytest.fixture(scope="module")
def routing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("routing_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(routing: ModuleType, trace: str, strategy: Strategy, **options: Any) -> Any:
    make, rate = routing.TRACES[trace]
    return routing.Simulation(strategy, 1, **options).run(list(make(random.Random(1), 3_000, rate)))


def test_hot_prefixes_hit_nearly_as_often_as_one_shared_cache_would_without_a_hot_spot(routing: ModuleType) -> None:
    result = run(routing, "shared prefixes", Strategy.PREFIX_AWARE)

    assert result.hit_rate >= 0.85 * result.oracle
    assert result.skew <= 1.3


def test_affinity_costs_prompts_that_share_nothing_nothing(routing: ModuleType) -> None:
    aware = run(routing, "unique", Strategy.PREFIX_AWARE)
    least_loaded = run(routing, "unique", Strategy.LEAST_LOADED)

    assert aware.ttft_p99 <= 1.02 * least_loaded.ttft_p99


def test_a_restarted_gateway_hits_as_before_within_a_minute(routing: ModuleType) -> None:
    restarted = run(routing, "shared prefixes", Strategy.PREFIX_AWARE, restart=True)
    assert restarted.after >= 0.9 * restarted.before


def test_with_kv_events_a_restart_costs_conversations_nothing(routing: ModuleType) -> None:
    """Beside the same minute without a restart: of this trace every minute hits less than the one before."""
    undisturbed = run(routing, "conversations", Strategy.PREFIX_AWARE, learns=routing.Learns.EVENTS)
    restarted = run(routing, "conversations", Strategy.PREFIX_AWARE, learns=routing.Learns.EVENTS, restart=True)
    assert restarted.after >= 0.97 * undisturbed.after
    assert restarted.after > run(routing, "conversations", Strategy.PREFIX_AWARE, restart=True).after
