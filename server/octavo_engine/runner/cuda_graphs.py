"""Decode steps replayed as CUDA graphs: one launch a step instead of hundreds.

A graph replays fixed addresses and a fixed number of sequences. So there is one for each rung of a ladder of batch
sizes; a batch of decodes is copied into the shared input buffers and padded to the next rung with sequences of length
0, whose keys go to slot -1, which no kernel writes. Anything else (prefills, mixed batches, batches above the ladder)
runs eagerly.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo_kernels.batch import AttentionBatch, PagedKVCache

_log = logging.getLogger(__name__)

DEFAULT_MAX_SEQS = 256

Forward = Callable[[torch.Tensor, AttentionBatch, Sequence[PagedKVCache]], torch.Tensor]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The ladder: fine steps where padding would cost much, coarse ones above; ends at max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 1, 32)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def capture_cuda_graph() -> Capture:
    """Captures into one memory pool shared by all graphs: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and settles cuBLAS workspaces outside the graph
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = call()
        return graph.replay, out

    return capture


@dataclass(frozen=True, slots=True)
class _Rung:
    """One captured batch size. logits: [size, vocab_size], a view of what all rungs share, overwritten by every
    replay: an output of its own for each rung would take gigabytes with large vocabularies."""

    replay: Replay
    logits: torch.Tensor


class DecodeGraphs:
    """A `CompiledStep` around any model's forward pass.

    hidden: the model up to the final norm, [T, hidden_size]; logits: its head, float32. max_model_len bounds the
    block tables. All graphs are captured at the first call, from the largest down, so that the largest sizes the
    shared memory pool; the runner's warm-up makes that call. A model that cannot be captured (an op that waits for
    the device) runs eagerly: logged once, and `unavailable` says why.
    """

    def __init__(
        self,
        hidden: Forward,
        logits: Callable[[torch.Tensor], torch.Tensor],
        max_model_len: int,
        device: torch.device,
        capture: Capture,
        max_num_seqs: int = DEFAULT_MAX_SEQS,
    ) -> None:
        self._hidden = hidden
        self._logits = logits
        self._max_model_len = max_model_len
        self._device = device
        self._capture = capture
        self._sizes = batch_sizes(max_num_seqs)
        self._rungs: dict[int, _Rung] = {}
        self._caches: Sequence[PagedKVCache] = ()
        self._buffers: _Buffers | None = None
        self.unavailable = ""
        self.num_replays = 0
        self.num_eager = 0

    @property
    def sizes(self) -> list[int]:
        """Batch sizes that have a graph once captured."""
        return self._sizes

    def __call__(
        self,
        token_ids: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[PagedKVCache],
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        """See `CompiledStep`. Results of a replay are copied out, so the next one may overwrite its buffers."""
        if not self._same_caches(caches):
            self._capture_all(caches)
        size = self._rung_size(batch)
        buffers = self._buffers
        if size is None or buffers is None:
            self.num_eager += 1
            return self._logits(self._hidden(token_ids, batch, caches)[logits_indices])
        buffers.fill(token_ids, batch, size)
        rung = self._rungs[size]
        rung.replay()
        self.num_replays += 1
        return rung.logits[logits_indices]

    def _rung_size(self, batch: AttentionBatch) -> int | None:
        """The smallest rung that holds the batch, or None for a batch no graph can run."""
        decodes_only = batch.num_decodes == batch.num_seqs == batch.num_tokens
        if not decodes_only or batch.max_seq_len > self._max_model_len:
            return None
        place = bisect.bisect_left(self._sizes, batch.num_seqs)
        return self._sizes[place] if place < len(self._sizes) else None

    def _same_caches(self, caches: Sequence[PagedKVCache]) -> bool:
        """Graphs hold the addresses of the caches they were captured with."""
        return len(self._caches) == len(caches) and all(a is b for a, b in zip(self._caches, caches, strict=True))

    def _capture_all(self, caches: Sequence[PagedKVCache]) -> None:
        self._caches = tuple(caches)
        try:
            self._buffers, self._rungs = self._captured(caches)
        except RuntimeError as error:  # torch raises it for whatever a stream cannot record
            self._buffers, self._rungs, self.unavailable = None, {}, str(error)
            _log.warning("decode steps run without CUDA graphs: %s", error)
            return
        _log.info("captured decode graphs for batches of %s", ", ".join(str(size) for size in self._sizes))

    def _captured(self, caches: Sequence[PagedKVCache]) -> tuple[_Buffers, dict[int, _Rung]]:
        block_size = caches[0].block_size
        buffers = _Buffers(self._sizes[-1], -(-self._max_model_len // block_size), self._device)
        probe = self._padded_logits(buffers, 1, caches)
        shared = probe.new_empty((self._sizes[-1], probe.shape[1]))
        rungs: dict[int, _Rung] = {}
        for size in reversed(self._sizes):

            def run(size: int = size) -> torch.Tensor:
                return shared[:size].copy_(self._padded_logits(buffers, size, caches))

            rungs[size] = _Rung(*self._capture(run))
        return buffers, rungs

    def _padded_logits(self, buffers: _Buffers, size: int, caches: Sequence[PagedKVCache]) -> torch.Tensor:
        """Logits of whatever is in the buffers: [size, vocab_size]."""
        batch = buffers.batch(size, self._max_model_len)
        return self._logits(self._hidden(buffers.token_ids[:size], batch, caches))


class _Buffers:
    """The inputs every graph reads; the first `size` entries belong to the rung of that size."""

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids = zeros(max_num_seqs)
        self.positions = zeros(max_num_seqs)
        self.slot_mapping = zeros(max_num_seqs) - 1
        self.seq_lens = zeros(max_num_seqs, dtype=torch.int32)
        self.block_tables = zeros(max_num_seqs, max_blocks, dtype=torch.int32)
        self.query_start_loc = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)

    def batch(self, size: int, max_model_len: int) -> AttentionBatch:
        """Views of the first `size` sequences; the longest context is assumed, lengths are read on the device."""
        return AttentionBatch(
            positions=self.positions[:size],
            slot_mapping=self.slot_mapping[:size],
            query_start_loc=self.query_start_loc[: size + 1],
            seq_lens=self.seq_lens[:size],
            block_tables=self.block_tables[:size],
            num_decodes=size,
            max_query_len=1,
            max_seq_len=max_model_len,
        )

    def fill(self, token_ids: torch.Tensor, batch: AttentionBatch, size: int) -> None:
        """Copy a batch in and pad it to `size` sequences that read and write nothing."""
        count, width = batch.block_tables.shape
        self.token_ids[:count].copy_(token_ids)
        self.positions[:count].copy_(batch.positions)
        self.slot_mapping[:count].copy_(batch.slot_mapping)
        self.seq_lens[:count].copy_(batch.seq_lens)
        self.block_tables[:count, :width].copy_(batch.block_tables)
        if count < size:
            self.slot_mapping[count:size].fill_(-1)
            self.seq_lens[count:size].zero_()
            self.token_ids[count:size].zero_()
            self.positions[count:size].zero_()
