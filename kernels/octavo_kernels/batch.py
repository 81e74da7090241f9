"""The values that describe one step's batch and one layer's paged KV cache to the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class AttentionBatch:
    """One flat batch of tokens from several sequences, each reading its own blocks.

    Sequences with exactly one new token come first: the first `num_decodes` sequences are tokens `0..num_decodes-1`.
    All tensors live on the model's device. `T` tokens, `S` sequences.

    positions:       [T] int64, position of each token in its sequence
    slot_mapping:    [T] int64, where its key and value go: block_id * block_size + offset; -1 for padding
    query_start_loc: [S + 1] int32, sequence s owns tokens query_start_loc[s] .. query_start_loc[s + 1] - 1
    seq_lens:        [S] int32, length of each sequence after this step (cached and new tokens)
    block_tables:    [S, max_blocks] int32, padded with 0
    max_query_len, max_seq_len: largest query length and `seq_lens` entry, known on the host
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


@dataclass(slots=True)
class PagedKVCache:
    """Keys and values of one layer, in blocks.

    key, value: [num_blocks, num_kv_heads, block_size, head_dim], float32, bfloat16, float16, int8 or float8_e4m3fn.
    key_scale, value_scale: [num_blocks, num_kv_heads, block_size] float32 for int8 and float8 (one scale for each
    token and head: x = stored * scale), otherwise None.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.key.device

    @property
    def block_size(self) -> int:
        return self.key.shape[2]
