"""How ranks divide a model: everything is held, nothing twice unless it must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.parallel.host import Nodes, read_nodes
from octavo_engine.parallel.sections import share
from octavo_engine.parallel.topology import Topology, heads_of


@given(st.integers(0, 500), st.integers(1, 9))
def test_shares_follow_each_other_and_differ_by_one_at_most(size: int, count: int) -> None:
    parts = [share(size, index, count) for index in range(count)]

    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(size))
    assert max(part.length for part in parts) - min(part.length for part in parts) <= 1


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 3))
def test_each_query_head_is_on_the_rank_of_its_key_head(kv_heads: int, group: int, power: int) -> None:
    count, heads = 2**power, kv_heads * group
    if heads % count or (kv_heads % count and count % kv_heads):
        return  # refused by check_topology

    seen: list[int] = []
    for index in range(count):
        query, kv = heads_of(heads, kv_heads, index, count)
        seen.extend(range(query.start, query.stop))
        local_group = query.length // kv.length
        for place in range(query.length):
            assert (query.start + place) // group == kv.start + place // local_group
    assert seen == list(range(heads))


@given(st.integers(1, 100), st.integers(1, 8))
def test_stages_hold_every_layer_once_in_order(num_layers: int, pipeline: int) -> None:
    topology = Topology(tensor=2, pipeline=pipeline)

    layers = [layer for stage in range(pipeline) for layer in topology.layers(num_layers, stage)]

    assert layers == list(range(num_layers))
    assert [topology.place(rank) for rank in range(topology.world_size)][:3] == [(0, 0), (0, 1), (1, 0)][
        : topology.world_size
    ]


def _config(ranks: int) -> EngineConfig:
    return EngineConfig(model="m", tensor_parallel_size=ranks)


def test_nodes_are_read_from_the_environment_and_filled_in_order() -> None:
    environment = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}

    nodes = read_nodes(_config(8), environment)

    assert nodes == Nodes("first", 29500, 1, 2)
    assert list(nodes.ranks_here(8)) == [4, 5, 6, 7]
    assert read_nodes(_config(8), {}) == Nodes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR and MASTER_PORT: must name"),
        ({"NODE_RANK": "2"}, "NODE_RANK: must be between 0 and 1, got 2"),
        ({"NNODES": "3"}, "NNODES: 3 nodes cannot hold 8 ranks evenly"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: must be a number, got 'http'"),
    ],
)
def test_nodes_that_cannot_be_are_refused(change: dict[str, str], message: str) -> None:
    environment = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500", **change}

    with pytest.raises(ConfigError, match=message):
        read_nodes(_config(8), environment)
