"""Decode graphs: which batches they take, and that padding changes nothing. Capturing is replaced by re-running."""

from __future__ import annotations

import pytest
import torch

from octavo_engine.runner.batch_builder import build_step
from octavo_engine.runner.cuda_graphs import DecodeGraphs, batch_sizes
from octavo_engine.runner.interface import SequenceSlice
from octavo_kernels.batch import PagedKVCache

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 16, 32
DEVICE = torch.device("cpu")


def rerun(call):
    """A capture whose replay runs the call again into the same output, as a graph would."""
    out = call().clone()
    return lambda: out.copy_(call()), out


class Model:
    """Writes its input into the cache and sums what its sequence holds: shows wrong slots, lengths and tables."""

    def __init__(self) -> None:
        self.table = torch.randn(50, 3)
        self.calls = 0

    def hidden(self, token_ids, batch, caches):
        self.calls += 1
        x = self.table[token_ids] + batch.positions.unsqueeze(1)
        flat = caches[0].key.view(-1, 3)
        written = batch.slot_mapping >= 0
        flat[batch.slot_mapping[written]] = x[written]
        sums = []
        for seq in range(batch.num_seqs):
            length = int(batch.seq_lens[seq])
            places = torch.arange(length)
            slots = batch.block_tables[seq, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
            sums.append(flat[slots.long()].sum(0))
        lengths = batch.query_start_loc.diff().long()
        return x + torch.stack(sums).repeat_interleave(lengths, 0)

    def logits(self, hidden):
        return hidden @ torch.ones(3, 5)


def new_cache():
    shape = (NUM_BLOCKS, 1, BLOCK_SIZE, 3)
    return PagedKVCache(torch.ones(shape), torch.zeros(shape))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def graphs(model):
    return DecodeGraphs(model.hidden, model.logits, MAX_LEN, DEVICE, rerun, max_num_seqs=6)


def step(run, slices, caches):
    inputs = build_step(slices, BLOCK_SIZE, DEVICE)
    return run(inputs.token_ids, inputs.batch, caches, inputs.logits_indices)


def decode(token, length, blocks, num_logits=1):
    return SequenceSlice([token], length - 1, blocks, num_logits)


def test_ladders_grow_and_end_at_the_largest_batch():
    for largest in (1, 3, 8, 100, 256, 300):
        sizes = batch_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        assert sizes[0] == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_replayed_decodes_equal_eager_ones_and_write_the_same_cache(model, graphs, count):
    slices = [decode(7 + i, 3 + i, [2 * i + 1, 2 * i + 2, 15]) for i in range(count)]
    replayed, eager = [new_cache()], [new_cache()]
    wanted_logits = step(
        lambda ids, batch, caches, rows: model.logits(model.hidden(ids, batch, caches)[rows]), slices, eager
    )
    actual = step(graphs, slices, replayed)
    assert torch.equal(actual, wanted_logits)
    assert torch.equal(replayed[0].key, eager[0].key)
    assert graphs.num_replays == 1


def test_a_smaller_batch_after_a_larger_one_leaves_nothing_behind(model, graphs):
    caches = [new_cache()]
    step(graphs, [decode(3, 9, [1, 2, 3]), decode(4, 6, [4, 5]), decode(5, 2, [6])], caches)
    before = caches[0].key.clone()
    step(graphs, [decode(9, 1, [8])], caches)
    changed = (caches[0].key != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [8]


def test_only_the_wanted_rows_come_back_in_order(graphs, model):
    slices = [decode(1, 2, [1], 0), decode(2, 3, [2]), decode(3, 4, [3])]
    assert step(graphs, slices, [new_cache()]).shape == (2, 5)


@pytest.mark.parametrize(
    "slices",
    [
        [SequenceSlice([1, 2, 3], 0, [1])],
        [decode(1, 2, [1]), SequenceSlice([4, 5], 0, [2])],
        [decode(i, 2, [i + 1]) for i in range(7)],
    ],
    ids=["prefill", "mixed", "above the ladder"],
)
def test_other_batches_run_eagerly(graphs, slices):
    step(graphs, slices, [new_cache()])
    assert (graphs.num_replays, graphs.num_eager) == (0, 1)


def test_new_caches_are_captured_anew(graphs, model):
    first, second = [new_cache()], [new_cache()]
    step(graphs, [decode(1, 2, [1])], first)
    captured = model.calls
    step(graphs, [decode(1, 2, [1])], first)
    assert model.calls == captured + 1
    step(graphs, [decode(1, 2, [1])], second)
    assert model.calls > captured + len(graphs.sizes)
    assert torch.equal(first[0].key, second[0].key)


def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_why(model, caplog):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs(model.hidden, model.logits, MAX_LEN, DEVICE, refuse, max_num_seqs=2)
    caches = [new_cache()]
    for _ in range(2):
        assert step(graphs, [decode(1, 2, [1])], caches).shape == (1, 5)
    assert "not permitted" in graphs.unavailable
    assert graphs.num_eager == 2
    assert len(caplog.records) == 1
