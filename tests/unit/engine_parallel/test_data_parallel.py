"""Which engine a request goes to, and what several engines say together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.messages import AdapterStats, EngineStats
from octavo_engine.process.data_parallel import choose_engine, engine_config, merge_stats

LOADS = st.lists(st.integers(0, 50), min_size=1, max_size=8)
PROMPT = st.lists(st.integers(0, 2**31), min_size=1, max_size=100)


@given(LOADS, PROMPT)
def test_no_engine_gets_more_than_two_requests_ahead_of_the_idlest(loads: list[int], prompt: list[int]) -> None:
    assert loads[choose_engine(loads, prompt, "")] <= min(loads) + 2


@given(st.integers(1, 8), PROMPT, st.text(max_size=5))
def test_prompts_that_begin_alike_meet_their_prefix(count: int, prompt: list[int], salt: str) -> None:
    start = (prompt * 64)[:64]

    chosen = {choose_engine([3] * count, [*start, ending], salt) for ending in range(20)}

    assert len(chosen) == 1


def test_different_prompts_are_spread() -> None:
    assert {choose_engine([0] * 4, [number], "") for number in range(100)} == {0, 1, 2, 3}


def test_counts_are_added_and_times_are_the_slowest() -> None:
    one = EngineStats(num_running=2, requests_finished={"stop": 3}, retry_after_s=1.0, roofline_decode=0.5)
    two = EngineStats(num_running=5, requests_finished={"stop": 1, "abort": 2}, retry_after_s=4.0, roofline_decode=0.7)

    both = merge_stats([one, two])

    assert both.num_running == 7
    assert both.requests_finished == {"abort": 2, "stop": 4}
    assert both.retry_after_s == 4.0
    assert both.roofline_decode == pytest.approx(0.6)


def test_engines_share_the_processors_and_the_memory() -> None:
    config = engine_config(EngineConfig(model="m", device="cpu", data_parallel_size=2))

    assert config.data_parallel_size == 1
    assert config.num_threads >= 1
    assert config.kv_cache_memory_fraction == pytest.approx(0.45)


def test_one_address_for_events_is_not_enough_for_two_engines() -> None:
    with pytest.raises(ConfigError, match="kv_events_endpoint: several engines cannot publish on one address"):
        engine_config(EngineConfig(model="m", kv_events_endpoint="tcp://*:5557", data_parallel_size=2))


def test_an_adapter_is_there_when_every_engine_has_it() -> None:
    one = EngineStats(adapters=[AdapterStats(name="a", num_running=2), AdapterStats(name="b")])
    two = EngineStats(adapters=[AdapterStats(name="a", num_running=1, is_resident=True)])

    assert merge_stats([one, two]).adapters == [AdapterStats(name="a", num_running=3, is_resident=True)]
